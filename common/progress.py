"""A reply of query-migrate as one line for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from common.qmp.message import Json

_PAGE: Final = 4096  # of the stream, whatever the host's pages are


def progress_line(reply: Json, run_state: str) -> str:
    """What the migration does and how far it is; `run_state` in QEMU's words."""
    info = reply if isinstance(reply, Mapping) else {}
    status = str(info.get("status", "no migration"))
    parts = [
        *_sent(_object(info, "ram")),
        *_received(_object(info, "x-postcopyd")),
        *_addresses(info.get("socket-address")),
    ]
    if reason := info.get("error-desc"):
        parts.append(str(reason))
    said = f"{status}: {', '.join(parts)}" if parts else status
    return f"{said}; the guest is {run_state}"


def _sent(ram: Mapping[str, Json]) -> list[str]:
    """The source's side."""
    total, left = _number(ram, "total"), _number(ram, "remaining")
    if not total:
        return []
    done = 100 * max(total - left, 0) // total
    return [
        f"{done} % of {_mib(total)} MiB",
        f"pass {_number(ram, 'dirty-sync-count')}",
        f"{_mib(_number(ram, 'transferred'))} MiB sent",
        f"{_mib(left)} MiB left",
    ]


def _received(ours: Mapping[str, Json]) -> list[str]:
    """The destination's side."""
    pages = _number(ours, "precopy-pages") + _number(ours, "postcopy-pages")
    if not pages:
        return []
    return [
        f"{_mib(pages * _PAGE)} MiB received",
        f"{_number(ours, 'faults')} faults",
    ]


def _addresses(value: Json) -> list[str]:
    """Where a destination waits for its source."""
    if not isinstance(value, list):
        return []
    return [f"waiting at {_address(one)}" for one in value if isinstance(one, Mapping)]


def _address(members: Mapping[str, Json]) -> str:
    if members.get("type") == "inet":
        return f"{members.get('host')}:{members.get('port')}"
    return str(members.get("path") or members.get("port"))


def _object(members: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    value = members.get(name)
    return value if isinstance(value, Mapping) else {}


def _number(members: Mapping[str, Json], name: str) -> int:
    value = members.get(name)
    return int(value) if isinstance(value, int | float) else 0


def _mib(size: int) -> int:
    return size >> 20
