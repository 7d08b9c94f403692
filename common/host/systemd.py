"""What a service manager and its services tell each other, in both directions.

Notifications go out as datagrams to `$NOTIFY_SOCKET`; listening sockets and
descriptors kept for us come in from number 3 on, described by `$LISTEN_FDS`.
Without these variables nothing is sent and nothing is there. Sources:
sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR: Final = 3
STORED: Final = "keep-"
"""What the names of descriptors begin with that a daemon has had kept."""
UNNAMED: Final = "unknown"  # what sd_listen_fds_with_names(3) says
SEND_SECONDS: Final = 1.0
_PASSED: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


# --- to the manager ---------------------------------------------------------------


class Notifier:
    """Tells the service manager how things are; without one, says nothing.

    A manager that does not take a message is logged: the guest's migration does
    not depend on it.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET") or None
        self._said: str | None = None

    @property
    def heard(self) -> bool:
        """Whether there is a manager."""
        return self._address is not None

    def ready(self) -> None:
        """Started, or the configuration has been read again."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` is to follow."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def status(self, line: str) -> None:
        """What people see in `systemctl status`; sent only if it is news."""
        line = " ".join(line.split())
        if line != self._said:
            self._said = line
            self._send(f"STATUS={line}")

    def extend(self, seconds: float) -> None:
        """Starting, reloading or stopping may take so long from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def store(self, name: str, descriptors: Sequence[int]) -> None:
        """Have the manager keep descriptors for the process after this one.

        Without FDPOLL=0 it would drop a userfaultfd, which polls as broken
        while it is blocking or not negotiated.
        """
        _check_name(name)
        self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=descriptors)

    def discard(self, name: str) -> None:
        """Have it close all that was stored under this name."""
        _check_name(name)
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _send(self, *lines: str, descriptors: Sequence[int] = ()) -> None:
        if self._address is None:
            return
        # A name in the abstract space begins with a zero byte: unix(7).
        name = self._address.replace("@", "\0", 1)
        address = name if self._address.startswith("@") else self._address
        message = "\n".join(lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_SECONDS)
                sock.connect(address)
                socket.send_fds(sock, [message], descriptors)
        except OSError as error:
            reason = error.strerror or str(error)
            log.warning("the service manager was not told %s: %s", lines[0], reason)


def _check_name(name: str) -> None:
    """sd_notify(3): FDNAME is up to 255 printable ASCII characters, no colon."""
    good = name.isascii() and name.isprintable() and ":" not in name
    if not (good and 0 < len(name) <= 255):
        raise ValueError(f"not a name for a stored descriptor: {name!r}")


# --- from the manager ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passed:
    """A descriptor the manager handed over: a listening socket, or a stored one.

    Several may have one name. Their order means nothing.
    """

    name: str
    fd: int


def passed(environ: Mapping[str, str] = os.environ) -> tuple[Passed, ...]:
    """What this process was handed; asking twice gives the same."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return ()
    text = environ.get("LISTEN_FDS", "")
    count = int(text) if text.isdecimal() else 0
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    if len(names) != count:
        names = [UNNAMED] * count
    numbers = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count)
    return tuple(map(Passed, names, numbers))


def sockets(name: str, environ: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Descriptors of the listening sockets with this `FileDescriptorName=`."""
    return tuple(one.fd for one in passed(environ) if one.name == name)


def stored(environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    """What was kept for us under names that begin with STORED, by the rest."""
    return {
        one.name.removeprefix(STORED): one.fd
        for one in passed(environ)
        if one.name.startswith(STORED)
    }


def own_descriptors(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep what was handed over from programs that this process starts."""
    for one in passed(environ):
        os.set_inheritable(one.fd, False)
    for variable in _PASSED:
        environ.pop(variable, None)


def listening_socket(fd: int) -> socket.socket:
    """The unix stream socket behind a descriptor; OSError if it is none."""
    sock = socket.socket(fileno=fd)
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
        sock.detach()
        raise OSError(
            f"descriptor {fd} from the service manager is no listening unix socket;"
            " the .socket unit must have ListenStream= with a path"
        )
    return sock


def path_of(fd: int) -> str:
    """Where in the file system the socket behind a descriptor is."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return os.fsdecode(sock.getsockname())


def watchdog_seconds(environ: Mapping[str, str] = os.environ) -> float | None:
    """After how long a silence this process is restarted; None: never."""
    text = environ.get("WATCHDOG_USEC", "")
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6 if text.isdecimal() and int(text) else None
