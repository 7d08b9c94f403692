"""The attach messages: JSON in packets, and which descriptors each carries.

No I/O: packets in, records out. docs/attach-protocol.md is the contract. What a
guest's process sends is untrusted; decoding raises AttachError and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from common.guest.base import Device, GuestState
from common.qmp import message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from common.qmp.message import Json

VERSION: Final = 1
MAX_PACKET: Final = 65536
MAX_DESCRIPTORS: Final = 128
MAX_BLOCKS: Final = 64
MAX_VCPUS: Final = 256
MAX_IDSTR: Final = 255
# Fits the package of a stream (constants.MAX_PACKAGE) with room for the rest.
MAX_DEVICE_STATE: Final = 48 << 20
PAGE_SIZES: Final = (4096, 2 << 20)
# Where a process can map anything on x86-64, and more than a guest can have.
MAX_ADDRESS: Final = 1 << 56

_DEVICE_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-")

USERFAULTFD: Final = "userfaultfd"
PAGEMAP: Final = "pagemap"
STATE: Final = "state"
KEPT: Final = "keep:"


class AttachError(Exception):
    """A message that the protocol forbids; the text is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    idstr: str
    length: int
    page_size: int
    base: int
    guest_address: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """A guest hands itself over; `descriptors` name what came with the packet."""

    machine: str
    device: Device | None
    state: GuestState
    pid: int
    vcpus: tuple[int, ...]
    blocks: tuple[Block, ...]
    descriptors: tuple[str, ...]
    no_userfaultfd: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Return:
    id: int
    value: Mapping[str, Json]
    descriptors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    id: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    name: str
    data: Mapping[str, Json]


FromGuest: TypeAlias = Attach | Return | Failure | Event

T = TypeVar("T")


# --- From the guest ------------------------------------------------------------


def decode_untrusted(packet: bytes, descriptors: int) -> FromGuest:
    """One packet, which came with so many descriptors."""
    if len(packet) > MAX_PACKET:
        raise AttachError(f"a message of more than {MAX_PACKET} bytes")
    members = _object(_parse_untrusted(packet), "the message")
    if "attach" in members:
        return _attach_untrusted(_object(members["attach"], "attach"), descriptors)
    if "event" in members:
        data = _object(members.get("data", {}), "data")
        return Event(name=_text(members, "event", 64), data=data)
    if "error" in members:
        return Failure(id=_integer(members, "id"), text=_text(members, "error", 4096))
    if "return" in members:
        return Return(
            id=_integer(members, "id"),
            value=_object(members["return"], "return"),
            descriptors=_names(members, descriptors),
        )
    raise AttachError("a message that is no attach, return, error or event")


def _parse_untrusted(packet: bytes) -> Json:
    try:
        return message.decode_packet(packet)
    except ValueError as error:
        raise AttachError(f"a message that is not JSON: {error}") from None


def _attach_untrusted(members: Mapping[str, Json], descriptors: int) -> Attach:
    version = _integer(members, "version")
    if version != VERSION:
        raise AttachError(
            f"protocol version {version} is not supported, version {VERSION} is"
        )
    state = _text(members, "state", 16)
    if state not in list(GuestState):
        raise AttachError(f"state must be one of {', '.join(GuestState)}: {state!r}")
    attach = Attach(
        machine=_text(members, "machine", 255),
        device=_device(members.get("device")),
        state=GuestState(state),
        pid=_integer(members, "pid", low=1, high=1 << 31),
        vcpus=_vcpus(members),
        blocks=_blocks(members),
        descriptors=_names(members, descriptors),
        no_userfaultfd=_optional_text(members, "no-userfaultfd", 4096),
    )
    _check_descriptors(attach)
    return attach


def _device(value: Json) -> Device | None:
    if value is None:
        return None
    members = _object(value, "device")
    name = _text(members, "name", 64)
    if not set(name) <= _DEVICE_NAME:
        raise AttachError(f"device name may hold a-z, 0-9, '.' and '-': {name!r}")
    return Device(name=name, version=_integer(members, "version", 1, (1 << 32) - 1))


def _vcpus(members: Mapping[str, Json]) -> tuple[int, ...]:
    values = _list(members, "vcpus", MAX_VCPUS)
    return tuple(_in_range(value, "vcpus", 1, 1 << 31) for value in values)


def _blocks(members: Mapping[str, Json]) -> tuple[Block, ...]:
    values = _list(members, "blocks", MAX_BLOCKS)
    blocks = tuple(_block(_object(value, "blocks")) for value in values)
    if not blocks:
        raise AttachError("a guest needs at least one RAM block")
    if len({block.idstr for block in blocks}) < len(blocks):
        raise AttachError("two RAM blocks have the same idstr")
    return blocks


def _block(members: Mapping[str, Json]) -> Block:
    idstr = _text(members, "idstr", MAX_IDSTR)
    page_size = _integer(members, "page-size")
    length = _integer(members, "length", 1, MAX_ADDRESS)
    base = _integer(members, "base", 1, MAX_ADDRESS)
    if page_size not in PAGE_SIZES:
        raise AttachError(f"block {idstr!r}: page-size must be 4096 or 2097152")
    if length % page_size or base % page_size:
        raise AttachError(f"block {idstr!r}: length and base must be whole pages")
    return Block(
        idstr=idstr,
        length=length,
        page_size=page_size,
        base=base,
        guest_address=_integer(members, "guest-address", 0, MAX_ADDRESS),
    )


def _check_descriptors(attach: Attach) -> None:
    names = attach.descriptors
    wanted = [f"block:{block.idstr}" for block in attach.blocks]
    if not attach.no_userfaultfd:
        wanted.append(USERFAULTFD)
    for name in wanted:
        if name not in names:
            raise AttachError(f"the descriptor {name!r} is missing")
    for name in names:
        if name not in (*wanted, PAGEMAP) and not name.startswith(KEPT):
            raise AttachError(f"the descriptor {name!r} is not known")


def _names(members: Mapping[str, Json], count: int) -> tuple[str, ...]:
    """The names of the descriptors, which must be as many as came."""
    values = _list(members, "descriptors", MAX_DESCRIPTORS, optional=True)
    names = tuple(value for value in values if isinstance(value, str))
    if len(names) != count or len(values) != count:
        raise AttachError(f"{len(values)} descriptors are named, {count} came")
    if len(set(names)) != count:
        raise AttachError("two descriptors have the same name")
    return names


# --- Members ---------------------------------------------------------------------


def _object(value: Json, what: str) -> Mapping[str, Json]:
    if not isinstance(value, dict):
        raise AttachError(f"{what} must be an object")
    return value


def _text(members: Mapping[str, Json], name: str, most: int) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not 0 < len(value.encode()) <= most:
        raise AttachError(f"{name} must be a string of 1 to {most} bytes")
    if not value.isprintable():
        raise AttachError(f"{name} must be printable")
    return value


def _optional_text(members: Mapping[str, Json], name: str, most: int) -> str | None:
    return _text(members, name, most) if name in members else None


def _integer(
    members: Mapping[str, Json], name: str, low: int = 0, high: int = (1 << 63) - 1
) -> int:
    return _in_range(members.get(name), name, low, high)


def _in_range(value: Json, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise AttachError(f"{name} must be an integer")
    if not low <= value <= high:
        raise AttachError(f"{name} must be {low} to {high}: {value}")
    return value


def _list(
    members: Mapping[str, Json], name: str, most: int, *, optional: bool = False
) -> Sequence[Json]:
    value = members.get(name, [] if optional else None)
    if not isinstance(value, list) or len(value) > most:
        raise AttachError(f"{name} must be an array of at most {most}")
    return value


# --- To the guest ------------------------------------------------------------------


def attached() -> bytes:
    return message.encode({"attached": {"version": VERSION}})


def refused(reason: str) -> bytes:
    return message.encode({"refused": {"reason": reason[:1024]}})


def request(
    name: str, number: int, arguments: Mapping[str, Json], descriptors: Sequence[str]
) -> bytes:
    """A request; `descriptors` name what is sent along with the packet."""
    members: dict[str, Json] = {
        "request": name,
        "id": number,
        "arguments": dict(arguments),
    }
    if descriptors:
        members["descriptors"] = list(descriptors)
    return message.encode(members)
