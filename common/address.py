"""Migration addresses: QEMU's URIs, parsed. No I/O.

Source: QEMU docs, `migrate` and `-incoming`; the error texts are QEMU's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.qmp.message import Json

MAX_PORT: Final = 65535
MAX_OFFSET: Final = (1 << 63) - 1  # what lseek takes


class AddressError(ValueError):
    """An address that cannot be used; the text is QEMU's."""


@dataclass(frozen=True, slots=True)
class Tcp:
    """`host` may be empty when listening: all addresses."""

    host: str
    port: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Unix:
    path: str

    def __str__(self) -> str:
        return self.path


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


Address: TypeAlias = Tcp | Unix | File | Exec


def parse(uri: str) -> Address:
    """The address that a URI names."""
    _check(uri)
    scheme, colon, rest = uri.partition(":")
    match scheme if colon else "":
        case "tcp":
            return _tcp(rest)
        case "unix":
            return _unix(rest)
        case "file":
            return _file(rest)
        case "exec":
            return Exec(("/bin/sh", "-c", rest))
    raise AddressError(f"unknown migration protocol: {uri}")


def of_arguments(arguments: Mapping[str, Json]) -> Address:
    """The address in the arguments of `migrate` and `migrate-incoming`."""
    uri = arguments.get("uri")
    channels = arguments.get("channels") or ()
    if (uri is None) == (not channels):
        raise AddressError("need either 'uri' or 'channels' argument")
    if isinstance(uri, str):
        return parse(uri)
    assert isinstance(channels, list)
    if len(channels) != 1 or channels[0]["channel-type"] != "main":
        raise AddressError("Channel list must have only one entry, for type 'main'")
    return _of_channel(channels[0]["addr"])


def _tcp(rest: str) -> Tcp:
    host, colon, port = rest.rpartition(":")
    if not colon or not port or "," in port:
        raise AddressError(f"error parsing address '{rest}'")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise AddressError(f"error parsing address '{rest}'")
    return _checked_tcp(host, port)


def _checked_tcp(host: str, port: str) -> Tcp:
    if port.isdecimal() and int(port) > MAX_PORT:
        raise AddressError(f"port {port} is larger than {MAX_PORT}")
    return Tcp(host, port)


def _unix(path: str) -> Unix:
    if not path:
        raise AddressError("invalid Unix socket address")
    return Unix(path)


def _file(rest: str) -> File:
    path, _, offset = rest.partition(",offset=")
    try:
        return _checked_file(path, int(offset, 0) if offset else 0)
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


def _of_channel(addr: Mapping[str, Json]) -> Address:
    _check(*(text for text in addr.values() if isinstance(text, str)))
    match addr:
        case {"transport": "socket", "type": "inet", "host": str(host), "port": str(p)}:
            return _checked_tcp(host, p)
        case {"transport": "socket", "type": "unix", "path": str(path)}:
            return _unix(path)
        case {"transport": "file", "filename": str(path), "offset": int(offset)}:
            return _checked_file(path, offset)
        case {"transport": "exec", "args": list(words)} if words:
            _check(*map(str, words))
            return Exec(tuple(str(word) for word in words))
    raise AddressError(f"unknown migration protocol: {addr.get('transport')}")
