"""A scenario: several requests on one connection, with something to wait for.

For what depends on the state of a migration. Like exchanges, scenarios are data
and are played with a fresh QEMU and with a fresh daemon. In texts, FOLDER stands
for a folder of the one that plays it.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.exchanges import NEGOTIATE, PATIENCE, request

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = "FOLDER"
LISTEN = f"unix:{FOLDER}/listen"


@dataclass(frozen=True)
class Ask:
    """A request; with `shape` numbers and texts for people do not count."""

    data: bytes
    shape: bool = False


@dataclass(frozen=True)
class Until:
    """Wait for an event with these data."""

    event: str
    data: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Settled:
    """Ask for the run state until it is this one.

    QEMU changes it a moment after it has said that the migration is completed.
    """

    run_state: str


@dataclass(frozen=True)
class Connect:
    """Be a source: send this to where the destination listens, and go."""

    data: bytes


@dataclass(frozen=True)
class End:
    """Wait until the monitor is gone."""


Step = Ask | Until | Settled | Connect | End


@dataclass(frozen=True)
class Scenario:
    """What is done, in order, at one end."""

    name: str
    end: str
    steps: tuple[Step, ...]


def ask(command: str, /, **arguments: Any) -> Ask:
    """Underscores in argument names stand for dashes."""
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return Ask(request(command, named))


def look(command: str) -> Ask:
    return Ask(request(command), shape=True)


def status(name: str) -> Until:
    return Until("MIGRATION", (("status", name),))


def capabilities(**states: bool) -> Ask:
    """Underscores stand for dashes."""
    wanted = [
        {"capability": name.replace("_", "-"), "state": state}
        for name, state in states.items()
    ]
    return ask("migrate-set-capabilities", capabilities=wanted)


@dataclass
class Player:
    """Plays a scenario with the monitor at a socket; keeps what it says."""

    path: str
    folder: Path
    said: list[Any] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    _unmet: list[Any] = field(default_factory=list)

    def play(self, scenario: Scenario) -> None:
        with ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(PATIENCE)
            sock.connect(self.path)
            self._lines = stack.enter_context(sock.makefile("rb"))
            self._socket = sock
            self._message()
            self._do(Ask(NEGOTIATE))
            for step in scenario.steps:
                self._do(step)

    def _do(self, step: Step) -> None:
        match step:
            case Ask():
                self._socket.sendall(self._here(step.data))
                reply = self._reply()
                self.said.append(_shape(reply) if step.shape else reply)
            case Until():
                self._wait(step)
            case Settled():
                deadline = time.monotonic() + PATIENCE
                while self._run_state() != step.run_state:
                    assert time.monotonic() < deadline, step
            case Connect():
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(self.folder / "listen"))
                    sock.sendall(step.data)
            case End():
                while self._message() is not None:
                    pass

    def _run_state(self) -> str:
        self._socket.sendall(request("query-status"))
        return str(self._reply()["return"]["status"])

    def _here(self, data: bytes) -> bytes:
        return data.replace(FOLDER.encode(), str(self.folder).encode())

    def _reply(self) -> Any:
        while (message := self._message()) is not None:
            if "event" not in message:
                return message
        return "nothing"

    def _wait(self, step: Until) -> None:
        wanted = {
            "event": step.event,
            **({"data": dict(step.data)} if step.data else {}),
        }
        while not any(wanted.items() <= event.items() for event in self._unmet):
            assert self._message() is not None, f"{wanted} does not come"
        # Each wait is for an event of its own, whatever came in between.
        met = next(e for e in self._unmet if wanted.items() <= e.items())
        self._unmet.remove(met)

    def _message(self) -> Any:
        line = self._lines.readline()
        if not line:
            return None
        message = json.loads(line.replace(str(self.folder).encode(), FOLDER.encode()))
        message.pop("timestamp", None)
        if message.get("event") not in (None, "MIGRATION_PASS"):
            self.events.append(message)
            self._unmet.append(message)
        return message


def _shape(value: Any) -> Any:
    """`value` without what nobody can foresee."""
    if isinstance(value, dict):
        return {
            name: "text" if name in ("error-desc", "port") else _shape(inner)
            for name, inner in value.items()
            if name != "x-postcopyd"
        }
    if isinstance(value, list):
        return [_shape(item) for item in value]
    return "number" if isinstance(value, int | float) and value is not True else value
