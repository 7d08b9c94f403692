"""One monitor connection as a state machine: texts in, calls and lines out.

The session knows the order of things and nothing of sockets. Its owner feeds
bytes, asks for the next step, runs the call if the step is one, and reports
that the step is over:

    session.feed(data)
    for step in session.out_of_band(): …      # answer at once
    step = session.in_band()                  # answer, then session.finish()

Requests are judged when their turn comes, not when they arrive: a request
behind `qmp_capabilities` in the same write finds negotiation finished. Only
whether a request is out-of-band is decided on arrival, and only when the client
has enabled it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from common.qmp import message
from common.qmp.lexer import Lexer, LexError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.qmp.lexer import Text
    from common.qmp.message import Json
    from common.qmp.schema import Command

QUEUE_LIMIT: Final = 8  # in-band requests read ahead, with out-of-band enabled
NEGOTIATE: Final = "qmp_capabilities"


class CommandError(Exception):
    """A command cannot be carried out; `desc` is for people."""

    def __init__(self, desc: str, cls: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = cls


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request: run `command`'s handler with `arguments`, then reply."""

    command: Command
    arguments: Mapping[str, Json]
    echo: Mapping[str, Json]  # the request's id, as a member for the reply

    def success(self, value: Json) -> bytes:
        """The reply with a result."""
        return message.encode({"return": value, **self.echo})

    def failure(self, error: CommandError) -> bytes:
        """The reply that says why not."""
        return _failure(error, self.echo)


@dataclass(frozen=True, slots=True)
class Reply:
    """A line that is already the answer to a request."""

    line: bytes


Step: TypeAlias = Call | Reply


def event(name: str, data: Mapping[str, Json] | None, time_ns: int) -> bytes:
    """An event as a line; `time_ns` is wall-clock time since the epoch."""
    microseconds = time_ns // 1000
    stamp = {
        "seconds": microseconds // 1_000_000,
        "microseconds": microseconds % 1_000_000,
    }
    body = {} if data is None else {"data": data}
    return message.encode({"event": name, **body, "timestamp": stamp})


def greeting(version: Json) -> bytes:
    """The line a client gets before it has said anything."""
    return message.encode({"QMP": {"version": version, "capabilities": ["oob"]}})


@dataclass(frozen=True, slots=True)
class _Request:
    """A message in its place in the queue: a JSON value, or why it is none."""

    value: Json
    error: str | None = None


class Session:
    """Negotiation, queue and checks of one connection.

    `commands` are the commands that have a handler, by every name they have.
    """

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self.negotiated = False
        self.oob = False
        self._commands = commands
        self._lexer = Lexer()
        self._arrived: deque[_Request] = deque()
        self._queue: deque[_Request] = deque()

    # -- the order of requests

    def feed(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._arrived.extend(map(_request, self._lexer.feed(data)))

    @property
    def wants_data(self) -> bool:
        """Whether reading on is allowed; else some requests have to finish first."""
        return not self._arrived and len(self._queue) < self._limit

    @property
    def ready(self) -> bool:
        """Whether `in_band` has a step to give."""
        return bool(self._queue)

    @property
    def pending(self) -> bool:
        """Whether requests are left that have not been finished."""
        return bool(self._queue or self._arrived)

    def out_of_band(self) -> Iterator[Step]:
        """Requests to answer right now, whatever else is running.

        Moves the in-band requests in between to the queue while it has room.
        """
        while self._arrived and len(self._queue) < self._limit:
            request = self._arrived.popleft()
            if self.oob and _is_out_of_band(request.value):
                yield self._judge(request)
            else:
                self._queue.append(request)

    def in_band(self) -> Step | None:
        """The next request in order; `finish` it before asking again."""
        return self._judge(self._queue[0]) if self._queue else None

    def finish(self) -> None:
        """The step last returned by `in_band` has been answered."""
        self._queue.popleft()

    @property
    def _limit(self) -> int:
        return QUEUE_LIMIT if self.oob else 1

    # -- the checks, in the order in which they are made

    def _judge(self, request: _Request) -> Step:
        echo: Mapping[str, Json] = {}
        try:
            if request.error is not None:
                raise CommandError(request.error)
            members = _members(request.value)
            echo = {"id": members["id"]} if "id" in members else {}
            return self._judge_members(members, echo)
        except CommandError as error:
            return Reply(_failure(error, echo))

    def _judge_members(
        self, members: Mapping[str, Json], echo: Mapping[str, Json]
    ) -> Step:
        key, name = self._check_members(members)
        arguments = _members(members.get("arguments", {}))
        command = self._look_up(name)
        if key == "exec-oob" and not command.allow_oob:
            raise CommandError(f"The command {name} does not support OOB")
        command.check(arguments)
        if name != NEGOTIATE:
            return Call(command, arguments, echo)
        self._negotiate(arguments)
        return Reply(message.encode({"return": {}, **echo}))

    def _check_members(self, members: Mapping[str, Json]) -> tuple[str, str]:
        """The key that names the command (execute or exec-oob), and the name."""
        keys = ("execute", "exec-oob") if self.oob else ("execute",)
        present = [key for key in members if key in keys]
        for key in present:
            if not isinstance(members[key], str):
                raise CommandError(f"QMP input member '{key}' must be a string")
        if len(present) > 1:
            raise CommandError(
                f"QMP input member '{present[1]}' clashes with '{present[0]}'"
            )
        if not isinstance(members.get("arguments", {}), Mapping):
            raise CommandError("QMP input member 'arguments' must be an object")
        for name in members:
            if name not in (*keys, "arguments", "id"):
                raise CommandError(f"QMP input member '{name}' is unexpected")
        if not present:
            raise CommandError("QMP input lacks member 'execute'")
        return present[0], str(members[present[0]])

    def _look_up(self, name: str) -> Command:
        if not self.negotiated and name != NEGOTIATE:
            raise CommandError(
                f"Expecting capabilities negotiation with '{NEGOTIATE}'",
                "CommandNotFound",
            )
        if name not in self._commands:
            raise CommandError(
                f"The command {name} has not been found", "CommandNotFound"
            )
        return self._commands[name]

    def _negotiate(self, arguments: Mapping[str, Json]) -> None:
        if self.negotiated:
            raise CommandError(
                "Capabilities negotiation is already complete, command ignored",
                "CommandNotFound",
            )
        enable = arguments.get("enable", ())
        self.oob = isinstance(enable, list) and "oob" in enable
        self.negotiated = True


def _request(text: Text | LexError) -> _Request:
    if isinstance(text, LexError):
        return _Request(None, text.desc)
    return _Request(message.decode(text))


def _is_out_of_band(value: Json) -> bool:
    return isinstance(value, Mapping) and "exec-oob" in value and "execute" not in value


def _members(value: Json) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise CommandError("QMP input must be a JSON object")
    return value


def _failure(error: CommandError, echo: Mapping[str, Json]) -> bytes:
    report = {"class": error.error_class, "desc": error.desc}
    return message.encode({"error": report, **echo})
