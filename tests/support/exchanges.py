"""An exchange: what a client writes to a control socket, and what comes back.

Exchanges are data, so that the same ones can be had with any monitor: QEMU's
and the daemons'. The tables are tests/conformance/exchanges_*.py.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE: Final = 30.0  # seconds; a test that waits longer has failed

ENDS: Final = ("source", "destination")


def request(command: str, arguments: Any = None, /, **members: Any) -> bytes:
    """A request as a client would write it; `members` stand next to it."""
    body = {} if arguments is None else {"arguments": arguments}
    return json.dumps({"execute": command, **body, **members}).encode()


def oob(command: str, arguments: Any = None, /, **members: Any) -> bytes:
    """The same, to be executed out of band."""
    body = {} if arguments is None else {"arguments": arguments}
    return json.dumps({"exec-oob": command, **body, **members}).encode()


NEGOTIATE: Final = request("qmp_capabilities")
NEGOTIATE_OOB: Final = request("qmp_capabilities", {"enable": ["oob"]})
OURS: Final = "x-postcopyd-"
_LAST: Final = "the end of the exchange"


@dataclass(frozen=True)
class Exchange:
    """One connection, from the greeting to its end.

    `writes` go out one by one, behind what negotiates; then the client shuts
    down its side and reads to the end. With `asks_last` it asks once more and
    reads to the answer, because QEMU forgets what it has not yet executed or
    written when its client stops writing.
    """

    name: str
    writes: tuple[bytes, ...]
    ends: tuple[str, ...] = ENDS
    negotiate: bytes = NEGOTIATE
    asks_last: bool = False

    def with_monitor(self, path: str) -> bytes:
        """All that the monitor at the socket `path` says."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(path)
            for data in (self.negotiate, *self.writes):
                sock.sendall(data)
            if self.asks_last:
                sock.sendall(request("query-name", id=_LAST))
            else:
                sock.shutdown(socket.SHUT_WR)
            return b"".join(_read(sock))


def _read(sock: socket.socket) -> Iterator[bytes]:
    end = b""
    while data := sock.recv(1 << 16):
        yield data
        end = (end + data)[-200:]
        if _LAST.encode() in end and end.endswith(b"\n"):
            return


def exchange(name: str, *writes: bytes, **options: Any) -> Exchange:
    """The ordinary way to spell one."""
    return Exchange(name, writes, **options)


def calls(command: str, *arguments: Any, **options: Any) -> list[Exchange]:
    """One exchange for each of the arguments."""
    return [
        Exchange(f"{command} {_short(value)}", (request(command, value),), **options)
        for value in arguments
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 300 else f"{text[:100]}... {len(text)} characters"


def replies(said: bytes) -> list[Any]:
    """The lines as values, without what differs from one moment to the next."""
    assert said.endswith(b"\r\n")
    return [_lasting(line) for line in said.split(b"\r\n")[:-1]]


def _lasting(line: bytes) -> Any:
    """QEMU's package is the distribution's name for it, ours the daemon's."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        # QEMU's `inf`, or an id of the greatest depth: as text.
        return line.decode()
    reply.pop("timestamp", None)
    _leave_ours_out(reply.get("return"))
    for version in (reply.get("QMP", {}).get("version"), reply.get("return")):
        if isinstance(version, dict) and "package" in version:
            version["package"] = ""
    return reply


def _leave_ours_out(returned: Any) -> None:
    """Parameters that QEMU has not."""
    if isinstance(returned, dict):
        for name in [name for name in returned if name.startswith(OURS)]:
            del returned[name]


def told(reply: Any) -> str:
    """A reply as the document shows it."""
    if not isinstance(reply, dict):
        return str(reply)
    if "error" in reply:
        return str(reply["error"]["desc"])
    return json.dumps(reply.get("return", reply), sort_keys=True)


def first_difference(theirs: list[Any], ours: list[Any]) -> tuple[str, str]:
    """What each says at the first place where they are not of one mind."""
    length = max(len(theirs), len(ours))
    pairs = zip(_padded(theirs, length), _padded(ours, length), strict=True)
    return next((told(a), told(b)) for a, b in pairs if a != b)


def _padded(said: list[Any], length: int) -> list[Any]:
    return said + ["nothing"] * (length - len(said))
