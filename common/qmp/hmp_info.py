"""What `info` prints on the human monitor: QMP replies as QEMU words them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from common.qmp.message import Json

Ask: TypeAlias = "Callable[[str, Mapping[str, Json]], Awaitable[Json]]"
Reply: TypeAlias = "Mapping[str, Any]"  # as the schema describes it
Show: TypeAlias = "Callable[[Ask], Awaitable[Sequence[str]]]"


@dataclass(frozen=True, slots=True)
class Info:
    """A line `info NAME`; it has no words."""

    doc: str
    show: Show


def _of(command: str, words: Callable[[Any], Sequence[str]]) -> Show:
    """What `words` makes of the reply to a QMP query."""

    async def show(ask: Ask) -> Sequence[str]:
        return words(await ask(command, {}))

    return show


# --- migration --------------------------------------------------------------------

# Of QEMU's own: scripts skip them by counting lines.
_GLOBALS: Final = (
    "globals:",
    "store-global-state: on",
    "only-migratable: off",
    "send-configuration: on",
    "send-section-footer: on",
    "send-switchover-start: on",
    "clear-bitmap-shift: 18",
)
# Member, words in front, words behind; `kbytes` are bytes divided by 1024.
_TIMES: Final = (
    ("expected-downtime", "expected downtime", " ms"),
    ("downtime", "downtime", " ms"),
    ("setup-time", "setup", " ms"),
)
_RAM: Final = (
    ("transferred", "transferred ram", " kbytes"),
    ("mbps", "throughput", " mbps"),
    ("remaining", "remaining ram", " kbytes"),
    ("total", "total ram", " kbytes"),
    ("duplicate", "duplicate", " pages"),
    ("normal", "normal", " pages"),
    ("normal-bytes", "normal bytes", " kbytes"),
    ("dirty-sync-count", "dirty sync count", ""),
    ("page-size", "page size", " kbytes"),
    ("multifd-bytes", "multifd bytes", " kbytes"),
    ("pages-per-second", "pages-per-second", ""),
)
_RAM_UNLESS_ZERO: Final = (
    ("dirty-pages-rate", "dirty pages rate", " pages"),
    ("postcopy-requests", "postcopy request count", ""),
    ("precopy-bytes", "precopy ram", " kbytes"),
    ("downtime-bytes", "downtime ram", " kbytes"),
    ("postcopy-bytes", "postcopy ram", " kbytes"),
    ("dirty-sync-missed-zero-copy", "Zero-copy-send fallbacks happened", " times"),
)


def _migrate(info: Reply) -> Sequence[str]:
    lines = list(_GLOBALS)
    if reasons := info.get("blocked-reasons"):
        lines += ["Outgoing migration blocked:", *(f"  {one}" for one in reasons)]
    if "status" in info:
        lines += [_status(info), f"total time: {info.get('total-time', 0)} ms"]
    lines += [_line(info, row) for row in _TIMES if row[0] in info]
    if ram := info.get("ram"):
        lines += [_line(ram, row) for row in _RAM]
        lines += [_line(ram, row) for row in _RAM_UNLESS_ZERO if ram.get(row[0])]
    if "postcopy-blocktime" in info:
        lines.append(f"postcopy blocktime: {info['postcopy-blocktime']}")
    if "postcopy-vcpu-blocktime" in info:
        each = ",".join(map(str, info["postcopy-vcpu-blocktime"]))
        lines.append(f"postcopy vcpu blocktime: {each}")
    if addresses := info.get("socket-address"):
        shown = (f"\t{_address(address)}" for address in addresses)
        lines += ["socket address: [", *shown, "]"]
    return lines


def _status(info: Reply) -> str:
    why = ""
    if info["status"] == "failed" and "error-desc" in info:
        why = f" ({info['error-desc']})"
    return f"Migration status: {info['status']}{why}"


def _line(values: Reply, row: tuple[str, str, str]) -> str:
    member, words, unit = row
    value = values[member]
    if unit == " kbytes":
        value >>= 10
    if unit == " mbps":
        value = f"{value:.2f}"
    return f"{words}: {value}{unit}"


def _address(address: Reply) -> str:
    match address["type"]:
        case "inet":
            host = address["host"]
            host = f"[{host}]" if ":" in host else host
            return f"tcp:{host}:{address['port']}"
        case "vsock":
            return f"vsock:{address['cid']}:{address['port']}"
        case _:
            return f"unix:{address['path']}"


# In QEMU's order; the unit stands behind the value. None: a text in quotes.
_PARAMETERS: Final = (
    ("announce-initial", " ms"),
    ("announce-max", " ms"),
    ("announce-rounds", ""),
    ("announce-step", " ms"),
    ("throttle-trigger-threshold", ""),
    ("cpu-throttle-initial", ""),
    ("cpu-throttle-increment", ""),
    ("cpu-throttle-tailslow", ""),
    ("max-cpu-throttle", ""),
    ("tls-creds", None),
    ("tls-hostname", None),
    ("max-bandwidth", " bytes/second"),
    ("avail-switchover-bandwidth", " bytes/second"),
    ("downtime-limit", " ms"),
    ("x-checkpoint-delay", " ms"),
    ("multifd-channels", ""),
    ("multifd-compression", ""),
    ("zero-page-detection", ""),
    ("xbzrle-cache-size", " bytes"),
    ("max-postcopy-bandwidth", ""),
    ("tls-authz", None),
    ("x-vcpu-dirty-limit-period", " ms"),
    ("vcpu-dirty-limit", " MB/s"),
    ("mode", ""),
    ("direct-io", ""),
)


def _parameters(values: Reply) -> Sequence[str]:
    return [
        f"{name}: '{values[name]}'"
        if unit is None
        else f"{name}: {_word(values[name])}{unit}"
        for name, unit in _PARAMETERS
    ]


def _word(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _capabilities(entries: Sequence[Reply]) -> Sequence[str]:
    return [f"{entry['capability']}: {_word(entry['state'])}" for entry in entries]


def _dirty_rate(info: Reply) -> Sequence[str]:
    rate = info.get("dirty-rate")
    return [
        f"Status: {info['status']}",
        f"Start Time: {info['start-time']} (ms)",
        f"Sample Pages: {info['sample-pages']} (per GB)",
        f"Period: {info['calc-time']} (sec)",
        f"Mode: {info['mode']}",
        f"Dirty rate: {'(not ready)' if rate is None else f'{rate} (MB/s)'}",
    ]


# --- the guest --------------------------------------------------------------------


def _run_state(info: Reply) -> Sequence[str]:
    status = info["status"]
    more = "" if status in ("running", "paused") else f" ({status})"
    return [f"VM status: {'running' if info['running'] else 'paused'}{more}"]


def _name(info: Reply) -> Sequence[str]:
    return [info["name"]] if "name" in info else []


def _uuid(info: Reply) -> Sequence[str]:
    return [info["UUID"]]


def _version(info: Reply) -> Sequence[str]:
    qemu = info["qemu"]
    return [f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}{info['package']}"]


INFOS: Final[Mapping[str, Info]] = {
    "dirty_rate": Info(
        "show how fast the guest dirties memory", _of("query-dirty-rate", _dirty_rate)
    ),
    "migrate": Info("show migration status", _of("query-migrate", _migrate)),
    "migrate_capabilities": Info(
        "show migration capabilities", _of("query-migrate-capabilities", _capabilities)
    ),
    "migrate_parameters": Info(
        "show migration parameters", _of("query-migrate-parameters", _parameters)
    ),
    "name": Info("show the guest's name", _of("query-name", _name)),
    "status": Info("show the guest's run state", _of("query-status", _run_state)),
    "uuid": Info("show the guest's UUID", _of("query-uuid", _uuid)),
    "version": Info("show the version", _of("query-version", _version)),
}
