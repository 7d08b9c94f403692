"""What a QEMU tells of itself to whoever asks by QMP.

Old versions do not know each command, so what one of them refuses is left out.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.errors import HostError
from common.qmp.client import CommandFailed, QmpClient
from common.store import files, shell

if TYPE_CHECKING:
    from collections.abc import Callable

_Object = dict[str, Any]

_PATIENCE: Final = 10.0  # seconds
# What reading an answer of an unexpected shape meets.
_ODD: Final = (LookupError, TypeError, AttributeError, ValueError)
_MAX_LIST: Final = 1000  # entries that are noted
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred of <sys/socket.h>


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """`facts` by QMP; `words` are the command line, or else it says why not."""

    facts: dict[str, Any]
    process: int
    words: list[str]
    why_not: str = ""


def ask(path: str) -> Told:
    """The QEMU behind this socket; HostError."""
    process = _process_behind(path)
    try:
        with QmpClient(path, timeout=_PATIENCE) as client:
            facts = _facts(client)
    except TimeoutError:
        raise HostError(
            f"{path} does not answer; QEMU serves one client of a socket at a time:"
            " end the other one"
        ) from None
    except (OSError, EOFError, ValueError, LookupError, CommandFailed) as error:
        raise HostError(f"{path} does not speak as QEMU does: {error}") from None
    if "machine" not in facts:
        raise HostError(f"{path} is not the QMP socket of a VM: it has no machine")
    words, why_not = _command_line(process)
    return Told(facts=facts, process=process, words=words, why_not=why_not)


def _facts(client: QmpClient) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, command, arguments, read in _QUESTIONS:
        with suppress(CommandFailed, *_ODD):
            answer = read(client.execute(command, arguments))
            if answer not in (None, "", []):
                facts[name] = answer
    with suppress(CommandFailed, *_ODD):
        facts["cpus"] = _cpus(client)
    return facts


def _cpus(client: QmpClient) -> str:
    """How many of which model: all are of one."""
    cpus: Any = client.execute("query-cpus-fast")
    first = {"path": cpus[0]["qom-path"], "property": "type"}
    return f"{len(cpus)} of {str(client.execute('qom-get', first))[:200]}"


# --- how an answer is read: a text, or a list of them -----------------------------


def _member(name: str) -> Callable[[Any], Any]:
    return lambda answer: _text(answer.get(name))


def _text(value: object) -> str | None:
    return value[:1000] if isinstance(value, str) else None


def _version(answer: _Object) -> str:
    numbers = answer["qemu"]
    package = f" {answer['package']}" if answer["package"] else ""
    return f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}{package}"[:1000]


def _machine(answer: object) -> str | None:
    found = _text(answer)
    return found.removesuffix("-machine") if found else None


def _memory(answer: _Object) -> str:
    plugged = int(answer.get("plugged-memory", 0))
    more = f", {plugged} plugged" if plugged else ""
    return f"{int(answer['base-memory'])} bytes{more}"


def _backends(answer: list[_Object]) -> list[str]:
    return [
        f"{str(one.get('id', 'without id'))[:100]}: {int(one['size'])} bytes,"
        f" share={'on' if one.get('share') else 'off'}"
        for one in answer[:_MAX_LIST]
    ]


def _disks(answer: list[_Object]) -> list[str]:
    return [
        f"{str(one.get('device') or one.get('qdev'))[:200]}: {_medium(one)}"
        for one in answer[:_MAX_LIST]
    ]


def _medium(one: Mapping[str, Any]) -> str:
    inserted = one.get("inserted")
    if not isinstance(inserted, Mapping):
        return "empty"
    return f"{inserted.get('drv')} {inserted.get('file')}"[:1000]


def _consoles(answer: list[_Object]) -> list[str]:
    return [
        f"{str(one['label'])[:100]}: {str(one['filename'])[:1000]}"
        for one in answer[:_MAX_LIST]
    ]


def _kvm(answer: _Object) -> str:
    return "kvm" if answer["enabled"] else "not kvm"


_QUESTIONS: Final[tuple[tuple[str, str, Any, Callable[[Any], Any]], ...]] = (
    ("name", "query-name", None, _member("name")),
    ("uuid", "query-uuid", None, _member("UUID")),
    ("version", "query-version", None, _version),
    ("machine", "qom-get", {"path": "/machine", "property": "type"}, _machine),
    ("accel", "query-kvm", None, _kvm),
    ("memory", "query-memory-size-summary", None, _memory),
    ("memdev", "query-memdev", None, _backends),
    ("disk", "query-block", None, _disks),
    ("chardev", "query-chardev", None, _consoles),
)


# --- the process -------------------------------------------------------------------


def _process_behind(path: str) -> int:
    """Who listens there; 0 if it is in another PID namespace."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(path)
            found = sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
            )
    except TimeoutError:
        raise HostError(f"{path} takes no connection: is that QEMU busy?") from None
    except OSError as error:
        raise HostError(
            f"cannot connect to {path}: {error.strerror or error}; name the unix socket"
            " of the QEMU's option -qmp"
        ) from None
    pid: int = _CREDENTIALS.unpack(found)[0]
    return pid


def _command_line(process: int) -> tuple[list[str], str]:
    """Its words, or why there are none."""
    if process == 0:
        return [], "the process is in another container"
    try:
        content = files.read(Path(f"/proc/{process}/cmdline"), shell.MAX_COMMAND)
        words = shell.words_untrusted(content)
    except (HostError, shell.ShellError) as error:
        return [], f"of process {process}: {error}"
    # A socket that a manager or ssh made is theirs, not QEMU's.
    program = Path(words[0]).name
    if "qemu" not in program and "kvm" not in program:
        return [], f"process {process}, {program!a:.50}, has made that socket"
    return words, ""
