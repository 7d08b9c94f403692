"""A blocking QMP client, for command lines and tests.

    with QmpClient("/run/srcd/control") as client:
        client.execute("migrate", {"uri": "tcp:there:4444"})
        client.wait_event("MIGRATION", status="completed")

It speaks to the daemons and to QEMU alike. Events that arrive while it waits
for a reply are kept, in order. Nothing here needs trio.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from common.qmp import message
from common.qmp.lexer import Lexer, LexError

if TYPE_CHECKING:
    from types import TracebackType

    from common.qmp.message import Json

    Message = Mapping[str, Json]

TIMEOUT_SECONDS: Final = 30.0
RECEIVE_BYTES: Final = 65536


class CommandFailed(Exception):
    """The server answered with an error."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc


class QmpClient:
    """One connection, negotiated; a context manager that closes it.

    `server` is the path of its socket, or a socket that leads there. With `oob`
    commands may go out of band if the server offers that; `self.oob` tells.

    Every wait ends after its timeout in seconds with TimeoutError; a server
    that goes away gives EOFError or another OSError.
    """

    def __init__(
        self,
        server: str | os.PathLike[str] | socket.socket,
        *,
        timeout: float = TIMEOUT_SECONDS,
        oob: bool = False,
    ) -> None:
        self._timeout = timeout
        self._lexer = Lexer()
        self._messages: deque[Message] = deque()
        self._events: deque[Message] = deque()
        self._last_id = 0
        if isinstance(server, socket.socket):
            self._socket, path = server, None
        else:
            self._socket, path = socket.socket(socket.AF_UNIX), os.fspath(server)
        try:
            self._socket.settimeout(timeout)
            if path is not None:
                self._socket.connect(path)
            self.greeting = self._next(self._deadline(None))
            self.oob = oob and _offers_oob(self.greeting)
            self.execute("qmp_capabilities", {"enable": ["oob"]} if self.oob else {})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        self._socket.close()

    def execute(
        self,
        name: str,
        arguments: Mapping[str, Json] | None = None,
        *,
        timeout: float | None = None,
    ) -> Json:
        """Run a command and return its result; raises CommandFailed."""
        return self._call("execute", name, arguments, timeout)

    def execute_oob(
        self,
        name: str,
        arguments: Mapping[str, Json] | None = None,
        *,
        timeout: float | None = None,
    ) -> Json:
        """The same out-of-band; the client must have been made with `oob`."""
        return self._call("exec-oob", name, arguments, timeout)

    def execute_at_once(self, name: str, arguments: Mapping[str, Json]) -> Json:
        """Out-of-band if that goes, so that nothing before it holds it up."""
        return self._call("exec-oob" if self.oob else "execute", name, arguments, None)

    def events(self) -> list[Message]:
        """The events that have arrived and not been returned yet; never waits."""
        self._take_arrived()
        self._events.extend(self._messages)
        self._messages.clear()
        taken = list(self._events)
        self._events.clear()
        return taken

    def wait_event(
        self, name: str, timeout: float | None = None, **data: Json
    ) -> Message:
        """The next event of that name whose data have these members.

        Earlier events of other names stay where they are.
        """
        deadline = self._deadline(timeout)
        seen = 0
        while True:
            for event in list(self._events)[seen:]:
                if event["event"] == name and _has(event, data):
                    self._events.remove(event)
                    return event
            seen = len(self._events)
            self._events.append(self._next(deadline))

    def _call(
        self,
        key: str,
        name: str,
        arguments: Mapping[str, Json] | None,
        timeout: float | None,
    ) -> Json:
        body = {"arguments": arguments} if arguments else {}
        self._last_id += 1
        deadline = self._deadline(timeout)
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(message.encode({key: name, **body, "id": self._last_id}))
        return _result(self._reply(deadline))

    def _reply(self, deadline: float) -> Message:
        while True:
            received = self._next(deadline)
            if "event" in received:
                self._events.append(received)
            elif received.get("id") == self._last_id:  # not one given up before
                return received

    def _next(self, deadline: float) -> Message:
        """The next message of any kind."""
        while not self._messages:
            self._socket.settimeout(_left(deadline))
            self._take(self._socket.recv(RECEIVE_BYTES))
        return self._messages.popleft()

    def _take_arrived(self) -> None:
        """Read what can be read without waiting."""
        self._socket.settimeout(0)
        with suppress(BlockingIOError, EOFError):
            while True:
                self._take(self._socket.recv(RECEIVE_BYTES))

    def _take(self, data: bytes) -> None:
        if not data:
            raise EOFError("the server has closed the connection")
        for text in self._lexer.feed(data):
            if isinstance(text, LexError):
                raise ValueError(f"the server sent what is not JSON: {text.desc}")
            value = message.decode(text)
            if not isinstance(value, Mapping):
                raise ValueError("the server sent what is no message of QMP")
            self._messages.append(value)

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)


def _offers_oob(greeting: Message) -> bool:
    about = greeting.get("QMP")
    offered = about.get("capabilities") if isinstance(about, Mapping) else None
    return isinstance(offered, list) and "oob" in offered


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _has(event: Message, data: Mapping[str, Json]) -> bool:
    carried = event.get("data", {})
    return isinstance(carried, Mapping) and data.items() <= carried.items()


def _result(reply: Message) -> Json:
    error = reply.get("error")
    if isinstance(error, Mapping):
        raise CommandFailed(str(error.get("class")), str(error.get("desc")))
    return reply["return"]
