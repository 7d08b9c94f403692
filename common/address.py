"""Migration addresses: QEMU's URIs and channels, parsed. No I/O.

Source: QEMU docs, `migrate` and `-incoming`; the error texts are QEMU's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from common import sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.qmp.message import Json

MAX_PORT: Final = 65535
MAX_OFFSET: Final = (1 << 63) - 1  # what lseek takes
MAX_VSOCK: Final = (1 << 32) - 1
_FLAGS: Final = {"": True, "on": True, "off": False}


class AddressError(ValueError):
    """An address that cannot be used; the text is QEMU's."""


@dataclass(frozen=True, slots=True)
class Tcp:
    """`host` may be empty when listening: all addresses.

    `to` is the last port to try when listening. With only one of `ipv4` and
    `ipv6` the host is looked up in that family alone.
    """

    host: str
    port: str
    to: int | None = None
    ipv4: bool = True
    ipv6: bool = True
    keep_alive: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Unix:
    """`abstract`: a name in Linux's abstract namespace, not in the file system."""

    path: str
    abstract: bool = False

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """What the kernel takes."""
        return f"\0{self.path}" if self.abstract else self.path


@dataclass(frozen=True, slots=True)
class Vsock:
    """A host or virtual machine by its context id; texts, as they were given."""

    cid: str
    port: str

    def __str__(self) -> str:
        return f"{self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class Fd:
    """A descriptor that a client passed with `getfd`, by its name.

    `number` is its number in this process once it has been looked up, and then
    whoever connects owns it.
    """

    name: str
    number: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class File:
    path: str
    offset: int = 0

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class Exec:
    """A command whose standard input (output) carries the stream."""

    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return self.arguments[-1]


Address: TypeAlias = Tcp | Unix | Vsock | Fd | File | Exec


def takes_many(address: Address) -> bool:
    """Whether more than one connection can be made there, as preempt needs."""
    return isinstance(address, Tcp | Unix | Vsock)


# --- kept for another process --------------------------------------------------------

_LASTING: Final[Mapping[str, type[Tcp | Unix | Vsock]]] = {
    "tcp": Tcp,
    "unix": Unix,
    "vsock": Vsock,
}
_KINDS: Final[Mapping[str, Any]] = {"str": str, "bool": bool, "int | None": int | None}


def to_json(address: Address | None) -> Mapping[str, Json] | None:
    """An address that another process can use, for `of_json_untrusted`; else None."""
    if not isinstance(address, Tcp | Unix | Vsock):
        return None
    kind = next(kind for kind, made in _LASTING.items() if isinstance(address, made))
    return {"type": kind, **asdict(address)}


def of_json_untrusted(value: Json) -> Address | None:
    """The address, or None if that is not what it is."""
    if not isinstance(value, dict) or value.get("type") not in [*_LASTING]:
        return None
    members: dict[str, Any] = dict(value)
    made = _LASTING[members.pop("type")]
    kinds = {one.name: _KINDS[str(one.type)] for one in fields(made)}
    if not all(isinstance(one, kinds.get(name, ())) for name, one in members.items()):
        return None
    try:
        return made(**members)
    except TypeError:
        return None  # something is missing


# --- QEMU's URIs ---------------------------------------------------------------------


def parse(uri: str) -> Address:
    """The address that a URI names."""
    _check(uri)
    scheme, colon, rest = uri.partition(":")
    match scheme if colon else "":
        case "tcp":
            return _tcp(rest)
        case "unix":
            return _unix(rest)
        case "vsock":
            return _vsock(rest)
        case "fd":
            return _fd(rest)
        case "file":
            return _file(rest)
        case "exec":
            return Exec(("/bin/sh", "-c", rest))
    raise AddressError(f"unknown migration protocol: {uri}")


def of_arguments(arguments: Mapping[str, Json], *, incoming: bool = False) -> Address:
    """The address in the arguments of `migrate`, or of `migrate-incoming`."""
    uri = arguments.get("uri")
    channels = arguments.get("channels") or ()
    if (uri is None) == (not channels):
        raise AddressError("need either 'uri' or 'channels' argument")
    if isinstance(uri, str):
        return parse(uri)
    assert isinstance(channels, list)
    main = [entry for entry in channels if entry["channel-type"] == "main"]
    if len(main) > 1 and not incoming:
        raise AddressError("Channel list has more than one main entry")
    if len(main) != 1 or len(channels) != 1:
        raise AddressError("Channel list must have only one entry, for type 'main'")
    return _of_channel(main[0]["addr"])


# --- URIs -------------------------------------------------------------------------


def _tcp(rest: str) -> Tcp:
    place, *options = rest.split(",")
    host, colon, port = place.rpartition(":")
    if not colon or not port:
        raise AddressError(f"error parsing address '{rest}'")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif host.startswith("["):
        raise AddressError(f"error parsing IPv6 address '{rest}'")
    elif ":" in host:
        raise AddressError(f"error parsing address '{rest}'")
    given: dict[str, Json] = {}
    for option in options:
        name, equals, value = option.partition("=")
        given[name] = _option(rest, name, equals + value)
    return _checked_tcp(host, port, given)


def _option(rest: str, name: str, given: str) -> int | bool:
    """The value of `,name=value` behind a TCP address; `given` is `=value`."""
    value = given.removeprefix("=")
    if name == "to":
        if not value.isdecimal():
            raise AddressError("error parsing to= argument")
        return int(value)
    if name not in ("ipv4", "ipv6", "keep-alive"):
        raise AddressError(f"error parsing address '{rest}'")
    if value not in _FLAGS or given == "=":
        raise AddressError(f"error parsing '{name}' flag '{given}'")
    return _FLAGS[value]


def _checked_tcp(host: str, port: str, options: Mapping[str, Json]) -> Tcp:
    to = options.get("to")
    for number in (port, str(to or "")):
        if number.isdecimal() and int(number) > MAX_PORT:
            raise AddressError(f"port {number} is larger than {MAX_PORT}")
    if options.get("mptcp"):
        raise AddressError("multipath TCP is not supported")
    # One that is on, and nothing said about the other: only that one.
    ipv4, ipv6 = options.get("ipv4"), options.get("ipv6")
    if ipv4 is False and ipv6 is False:
        raise AddressError("Cannot disable IPv4 and IPv6 at same time")
    return Tcp(
        host,
        port,
        to=to if isinstance(to, int) else None,
        ipv4=bool(not ipv6 if ipv4 is None else ipv4),
        ipv6=bool(not ipv4 if ipv6 is None else ipv6),
        keep_alive=bool(options.get("keep-alive")),
    )


def _unix(path: str, *, abstract: bool = False) -> Unix:
    if not path:
        raise AddressError("invalid Unix socket address")
    return Unix(path, abstract)


def _vsock(rest: str) -> Vsock:
    cid, colon, port = rest.partition(":")
    if not colon or not cid or not port:
        raise AddressError(f"error parsing address '{rest}'")
    return _checked_vsock(cid, port)


def _checked_vsock(cid: str, port: str) -> Vsock:
    for what, number in (("cid", cid), ("port", port)):
        if not number.isdecimal() or int(number) > MAX_VSOCK:
            raise AddressError(f"Failed to parse {what} '{number}'")
    return Vsock(cid, port)


def _fd(name: str) -> Fd:
    if not name:
        raise AddressError("invalid file descriptor address")
    return Fd(name)


def _file(rest: str) -> File:
    path, given, offset = rest.partition(",offset=")
    try:
        return _checked_file(path, sizes.parse(offset) if given else 0)
    except ValueError:
        raise AddressError(
            f"file URI has bad offset {offset}: Invalid argument"
        ) from None


def _checked_file(path: str, offset: int) -> File:
    if not 0 <= offset <= MAX_OFFSET:
        raise AddressError(f"file URI has bad offset {offset}: Invalid argument")
    return File(path, offset)


def _check(*texts: str) -> None:
    """What the kernel ends at a zero byte would not be what was asked for."""
    if any("\0" in text for text in texts):
        raise AddressError("an address cannot contain a zero byte")


# --- channels ---------------------------------------------------------------------


def _of_channel(addr: Mapping[str, Json]) -> Address:
    _check(*(text for text in addr.values() if isinstance(text, str)))
    match addr:
        case {"transport": "socket"}:
            return _of_socket(addr)
        case {"transport": "file", "filename": str(path), "offset": int(offset)}:
            return _checked_file(path, offset)
        case {"transport": "exec", "args": list(words)} if words:
            _check(*map(str, words))
            return Exec(tuple(str(word) for word in words))
    raise AddressError(f"unknown migration protocol: {addr.get('transport')}")


def _of_socket(addr: Mapping[str, Json]) -> Address:
    match addr:
        case {"type": "inet", "host": str(host), "port": str(port)}:
            return _checked_tcp(host, port, addr)
        case {"type": "unix", "abstract": True, "tight": False}:
            raise AddressError("abstract sockets are supported with 'tight' only")
        case {"type": "unix", "path": str(path)}:
            return _unix(path, abstract=addr.get("abstract") is True)
        case {"type": "vsock", "cid": str(cid), "port": str(port)}:
            return _checked_vsock(cid, port)
        case {"type": "fd", "str": str(name)}:
            return _fd(name)
    raise AddressError(f"unknown migration protocol: {addr.get('type')}")
