"""The ends of a migration as a QMP client sees them: a daemon or a QEMU each.

An end is here, at a socket, or behind ssh, where `dstd proxy` leads to one.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from common import address
from common.qmp.client import CommandFailed, QmpClient
from common.status import MigrationStatus as M

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.address import Address
    from common.qmp.message import Json

SSH: Final = "ssh"
# The command that stands for ssh; it gets the host and what to run there.
SSH_VARIABLE: Final = "POSTCOPYD_SSH"
# What a control socket is called there if nothing is said: as here.
OURS, THEIRS = "srcd", "dstd"
END_SECONDS: Final = 5.0
ANYWHERE: Final = ("", "0.0.0.0", "::")
HERE: Final = "127.0.0.1"

# What one meets that goes away, or is no server of QMP.
_ODD: Final = (OSError, EOFError, ValueError, LookupError)
_SCHEMES: Final = {address.Tcp: "tcp", address.Unix: "unix", address.Vsock: "vsock"}


class Unreachable(Exception):
    """There is no talking to an end; one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an end's control socket is; `host` is None for this one."""

    host: str | None
    socket: str

    @classmethod
    def parse(cls, text: str, beside: str) -> Self:
        """`PATH` or `ssh:HOST[:PATH]`; ValueError. `beside`: our own socket."""
        if not text.startswith(f"{SSH}:"):
            return cls(None, text)
        host, colon, path = text.removeprefix(f"{SSH}:").partition(":/")
        if not host or host.startswith("-"):
            raise ValueError(f"{text!r} names no host")
        return cls(host, f"/{path}" if colon else _like(beside))

    def __str__(self) -> str:
        return f"{self.host}:{self.socket}" if self.host else self.socket


def _like(ours: str) -> str:
    folder, name = os.path.split(ours)
    if not folder.startswith("/") or not name.startswith(OURS):
        raise ValueError("say where the control socket is there: ssh:HOST:SOCKET")
    return os.path.join(folder, THEIRS + name.removeprefix(OURS))


@dataclass(frozen=True, slots=True)
class Seen:
    """What an end says of its migration."""

    status: str
    error: str
    listening: Address | None

    def __str__(self) -> str:
        return f"{self.status} ({self.error})" if self.error else self.status


class End:
    """One end; a context manager that closes the connection.

    Unreachable whenever it does not answer, CommandFailed if it refuses.
    """

    def __init__(self, role: str, place: Place, timeout: float) -> None:
        self.role = role
        self.place = place
        self._process: subprocess.Popen[bytes] | None = None
        try:
            server = self._proxy() if place.host else place.socket
            self._client = QmpClient(server, timeout=timeout, oob=True)
        except (*_ODD, CommandFailed) as error:
            self._end_proxy()
            raise self._unreachable(error) from None

    def _proxy(self) -> socket.socket:
        ssh = shlex.split(os.environ.get(SSH_VARIABLE, SSH))
        there = shlex.join([THEIRS, "proxy", "--qmp", self.place.socket])
        ours, its = socket.socketpair()
        words = [*ssh, str(self.place.host), there]
        with its:
            try:
                self._process = subprocess.Popen(
                    words, stdin=its.fileno(), stdout=its.fileno()
                )
            except OSError:
                ours.close()
                raise
        return ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._end_proxy()

    def _end_proxy(self) -> None:
        """It ends when its connection does; ssh may be waiting for its network."""
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            self._process.kill()
            self._process.wait()

    def _unreachable(self, error: Exception) -> Unreachable:
        why = getattr(error, "strerror", None) or str(error)
        if isinstance(error, TimeoutError):
            why = "no answer; a QEMU talks to one client at a time"
        return Unreachable(f"{self.role}: cannot talk to {self.place}: {why}")

    def _ask(self, command: str, *, at_once: bool = False, **arguments: Json) -> Json:
        ask = self._client.execute_at_once if at_once else self._client.execute
        try:
            return ask(command, arguments)
        except _ODD as error:
            raise self._unreachable(error) from None

    def look(self) -> Seen:
        try:
            info = self._ask("query-migrate")
        except CommandFailed as error:
            raise self._unreachable(error) from None
        if not isinstance(info, Mapping):
            raise self._unreachable(ValueError("it speaks of no migration"))
        return Seen(
            status=str(info.get("status", M.NONE)),
            error=str(info.get("error-desc", "")),
            listening=_address(info.get("socket-address")),
        )

    def pause(self) -> None:
        self._ask("migrate-pause", at_once=True)

    def recover(self, uri: str) -> None:
        """Listen there again; this is the destination."""
        self._ask("migrate-recover", at_once=True, uri=uri)

    def resume(self, uri: str) -> None:
        """Connect there again; this is the source."""
        self._ask("migrate", uri=uri, resume=True)

    @property
    def host(self) -> str:
        """What to call its host in an address."""
        return (self.place.host or HERE).rpartition("@")[2]


def _address(places: Json) -> Address | None:
    """The first of a reply's `socket-address`, if one can connect to it."""
    place = places[0] if isinstance(places, list) and places else None
    if not isinstance(place, Mapping):
        return None
    addr: Json = {"transport": "socket", **place}
    try:
        return address.of_arguments(
            {"channels": [{"channel-type": "main", "addr": addr}]}
        )
    except address.AddressError:
        return None  # a descriptor


def uri(found: Address) -> str:
    return f"{_SCHEMES[type(found)]}:{found}"


def reachable(listening: Address, wanted: Address | None, host: str) -> Address:
    """Where the source connects to a destination that is `listening`.

    `wanted` is what it was told to listen at, `host` what its host is called:
    all addresses of a host are none to connect to.
    """
    if not isinstance(listening, address.Tcp):
        return listening
    names: Sequence[str] = (
        wanted.host if isinstance(wanted, address.Tcp) else "",
        listening.host,
        host,
    )
    name = next(name for name in names if name not in ANYWHERE)
    return address.Tcp(name, listening.port)
