"""The skeleton of a stream: file header, configuration, sections, known bodies.

A fresh stream begins with `FILE_HEADER` and one configuration section. After
that it is a row of things which each begin with one type byte (QEMU_VM_… in
`constants`); whoever reads the stream takes that byte and calls the decoder of
what follows. A section is a header, a body and a footer. Its body has no
length: the reader must know the section, and this module knows four bodies,
RAM setup, globalstate, timer, and the device state of our own guests.
"""

from __future__ import annotations

import uuid as uuids
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from common.stream.fields import Read

FILE_HEADER: Final = fields.be32(c.QEMU_VM_FILE_MAGIC) + fields.be32(
    c.QEMU_VM_FILE_VERSION
)
EOF: Final = bytes([c.QEMU_VM_EOF])


def read_file_header_untrusted(read: Read) -> None:
    """Check magic and version; only a fresh stream has this header."""
    fields.expect(
        "magic of a migration stream", c.QEMU_VM_FILE_MAGIC, fields.be32_untrusted(read)
    )
    fields.expect("stream version", c.QEMU_VM_FILE_VERSION, fields.be32_untrusted(read))


# --- The configuration section ----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What a source says about its machine before anything else.

    `target_page_bits` is None for the architecture's smallest page, which is
    every x86 machine. `capabilities` are the validated ones that are on.
    """

    machine: str
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: uuids.UUID | None = None


def encode_configuration(configuration: Configuration) -> bytes:
    """The section with its type byte and the subsections that it needs."""
    machine = configuration.machine.encode()
    if len(machine) > c.MAX_MACHINE_NAME:
        raise ValueError(f"machine name too long: {configuration.machine!r}")
    return b"".join(
        (
            bytes([c.QEMU_VM_CONFIGURATION]),
            fields.be32(len(machine)),
            machine,
            *_configuration_subsections(configuration),
        )
    )


def _configuration_subsections(configuration: Configuration) -> Iterator[bytes]:
    if configuration.target_page_bits is not None:
        yield _subsection(c.CONFIGURATION_PAGE_BITS)
        yield fields.be32(configuration.target_page_bits)
    if configuration.capabilities:
        yield _subsection(c.CONFIGURATION_CAPABILITIES)
        yield fields.be32(len(configuration.capabilities))
        yield from map(fields.name, configuration.capabilities)
    if configuration.uuid is not None:
        yield _subsection(c.CONFIGURATION_UUID)
        yield configuration.uuid.bytes


def _subsection(name: str) -> bytes:
    return (
        bytes([c.QEMU_VM_SUBSECTION])
        + fields.name(name)
        + fields.be32(c.CONFIGURATION_SUBSECTION_VERSION)
    )


def read_configuration_untrusted(read: Read) -> tuple[Configuration, int]:
    """Decode a configuration section, of which the type byte is still to come.

    The section ends where a type byte is not that of a subsection, so the byte
    behind it has to be read as well; it is the second thing returned.
    """
    fields.expect("section type", c.QEMU_VM_CONFIGURATION, fields.u8_untrusted(read))
    machine = _machine_untrusted(read)
    bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: uuids.UUID | None = None
    seen: set[str] = set()
    while (kind := fields.u8_untrusted(read)) == c.QEMU_VM_SUBSECTION:
        name = _subsection_untrusted(read, seen)
        match name:
            case c.CONFIGURATION_PAGE_BITS:
                bits = fields.be32_untrusted(read)
            case c.CONFIGURATION_CAPABILITIES:
                capabilities = _capabilities_untrusted(read)
            case c.CONFIGURATION_UUID:
                uuid = uuids.UUID(bytes=fields.take_untrusted(read, 16))
            case _:
                raise StreamError("unknown configuration subsection", got=name)
    configuration = Configuration(
        machine=machine, target_page_bits=bits, capabilities=capabilities, uuid=uuid
    )
    return configuration, kind


def _machine_untrusted(read: Read) -> str:
    length = fields.be32_untrusted(read)
    fields.bounded("machine name", length, c.MAX_MACHINE_NAME)
    return fields.text_untrusted(fields.take_untrusted(read, length))


def _subsection_untrusted(read: Read, seen: set[str]) -> str:
    """The name of the subsection; each may come once, so their number is bounded."""
    name = fields.name_untrusted(read)
    if name in seen:
        raise StreamError("repeated configuration subsection", got=name)
    seen.add(name)
    version = fields.be32_untrusted(read)
    fields.expect("subsection version", c.CONFIGURATION_SUBSECTION_VERSION, version)
    return name


def _capabilities_untrusted(read: Read) -> tuple[str, ...]:
    count = fields.be32_untrusted(read)
    fields.bounded("number of capabilities", count, c.MAX_CAPABILITIES)
    return tuple(fields.name_untrusted(read) for _ in range(count))


# --- Sections ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Set-up of a section that goes on in parts; `section_id` is the sender's."""

    section_id: int
    name: str
    instance: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """A section that is complete in one piece: device state."""

    section_id: int
    name: str
    instance: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    section_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    section_id: int


Header = Start | Part | End | Full

_NAMED: Final[dict[int, type[Start] | type[Full]]] = {
    c.QEMU_VM_SECTION_START: Start,
    c.QEMU_VM_SECTION_FULL: Full,
}
_CONTINUED: Final[dict[int, type[Part] | type[End]]] = {
    c.QEMU_VM_SECTION_PART: Part,
    c.QEMU_VM_SECTION_END: End,
}
_TYPES: Final[dict[type[Header], int]] = {
    Start: c.QEMU_VM_SECTION_START,
    Part: c.QEMU_VM_SECTION_PART,
    End: c.QEMU_VM_SECTION_END,
    Full: c.QEMU_VM_SECTION_FULL,
}

RAM_START: Final = Start(
    section_id=c.RAM_SECTION_ID,
    name=c.RAM_SECTION,
    instance=0,
    version=c.RAM_SECTION_VERSION,
)


def encode(header: Header) -> bytes:
    """The header of a section with its type byte."""
    head = bytes([_TYPES[type(header)]]) + fields.be32(header.section_id)
    if isinstance(header, Part | End):
        return head
    return (
        head
        + fields.name(header.name)
        + fields.be32(header.instance)
        + fields.be32(header.version)
    )


def encode_section(header: Header, body: bytes) -> bytes:
    """A whole section: header, body and footer."""
    return encode(header) + body + encode_footer(header.section_id)


def encode_footer(section_id: int) -> bytes:
    return bytes([c.QEMU_VM_SECTION_FOOTER]) + fields.be32(section_id)


def read_header_untrusted(read: Read, kind: int) -> Header:
    """Decode the header behind the type byte `kind`, which must be a section's."""
    if kind in _CONTINUED:
        return _CONTINUED[kind](section_id=fields.be32_untrusted(read))
    if kind in _NAMED:
        return _NAMED[kind](
            section_id=fields.be32_untrusted(read),
            name=fields.name_untrusted(read),
            instance=fields.be32_untrusted(read),
            version=fields.be32_untrusted(read),
        )
    raise StreamError("unknown section type", got=kind)


def read_footer_untrusted(read: Read, section_id: int) -> None:
    """Check that the section read last ends here; QEMU insists on it as well."""
    fields.expect("section footer", c.QEMU_VM_SECTION_FOOTER, fields.u8_untrusted(read))
    fields.expect("section id in a footer", section_id, fields.be32_untrusted(read))


# --- The setup body of RAM: the block list -----------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """One RAM block in the list; the optional fields are None when not sent.

    `length` and `page_size` are in bytes. The page size is sent after an ADVISE
    for blocks of huge pages (`listed_page_size`), the guest address for all
    blocks or none.
    """

    idstr: str
    length: int
    page_size: int | None = None
    guest_address: int | None = None


def listed_page_size(page_size: int) -> int | None:
    """What a block list says about a block's host page size, if ADVISE was sent."""
    return None if page_size == c.TARGET_PAGE_SIZE else page_size


def encode_ram_setup(blocks: Sequence[BlockEntry]) -> bytes:
    """The body of RAM's START section: total, block list, end."""
    total = sum(block.length for block in blocks)
    return b"".join(
        (
            fields.be64(total | c.RAM_SAVE_FLAG_MEM_SIZE),
            *map(_encode_block, blocks),
            fields.be64(c.RAM_SAVE_FLAG_EOS),
        )
    )


def _encode_block(block: BlockEntry) -> bytes:
    if block.length == 0 or block.length % c.TARGET_PAGE_SIZE:
        raise ValueError(f"block {block.idstr} is not made of whole pages")
    options = (block.page_size, block.guest_address)
    return (
        fields.name(block.idstr)
        + fields.be64(block.length)
        + b"".join(fields.be64(value) for value in options if value is not None)
    )


def read_ram_setup_untrusted(
    read: Read,
    *,
    page_size_of: Callable[[str], int] | None = None,
    guest_addresses: bool = False,
) -> tuple[BlockEntry, ...]:
    """Decode the body of RAM's START section.

    The bytes do not say which optional fields are there. `page_size_of` tells
    the receiver's own host page size of a block and is given if an ADVISE came
    before; it may raise StreamError for a block that does not exist.
    `guest_addresses` says that capability x-ignore-shared is on.
    """
    word = fields.be64_untrusted(read)
    flags = word % c.TARGET_PAGE_SIZE
    fields.expect("RAM setup", c.RAM_SAVE_FLAG_MEM_SIZE, flags)
    left = fields.bounded("RAM", word - flags, c.MAX_RAM_BYTES)
    blocks: dict[str, BlockEntry] = {}
    while left:
        fields.bounded("number of RAM blocks", len(blocks) + 1, c.MAX_BLOCKS)
        block = _block_untrusted(read, page_size_of, guest_addresses)
        if block.idstr in blocks:
            raise StreamError("repeated RAM block", got=block.idstr)
        if block.length > left:
            raise StreamError("RAM blocks exceed their total", left, block.length)
        blocks[block.idstr] = block
        left -= block.length
    fields.expect("end of RAM setup", c.RAM_SAVE_FLAG_EOS, fields.be64_untrusted(read))
    return tuple(blocks.values())


def _block_untrusted(
    read: Read, page_size_of: Callable[[str], int] | None, guest_addresses: bool
) -> BlockEntry:
    idstr = fields.name_untrusted(read)
    length = fields.be64_untrusted(read)
    if length == 0 or length % c.TARGET_PAGE_SIZE:
        raise StreamError(f"RAM block {idstr} is not made of whole pages", got=length)
    page_size = listed_page_size(page_size_of(idstr)) if page_size_of else None
    if page_size is not None:
        theirs = fields.be64_untrusted(read)
        fields.expect(f"host page size of RAM block {idstr}", page_size, theirs)
    return BlockEntry(
        idstr=idstr,
        length=length,
        page_size=page_size,
        guest_address=fields.be64_untrusted(read) if guest_addresses else None,
    )


# --- Bodies of device sections -----------------------------------------------

GLOBALSTATE_SIZE: Final = 104
TIMER_SIZE: Final = 24
_RUN_STATE_SIZE: Final = 32
_GLOBALSTATE_UNUSED: Final = 66


@dataclass(frozen=True, slots=True)
class GlobalState:
    """The source's run state: `running` makes the destination run the guest.

    Without this section QEMU assumes `running`.
    """

    run_state: str
    was_suspended: bool = False


def encode_globalstate(state: GlobalState) -> bytes:
    name = state.run_state.encode("ascii")
    if len(name) >= _RUN_STATE_SIZE:
        raise ValueError(f"run state too long: {state.run_state!r}")
    return (
        fields.be32(len(name) + 1)
        + name.ljust(_RUN_STATE_SIZE, b"\0")
        + bytes([1, state.was_suspended])
        + bytes(_GLOBALSTATE_UNUSED)
    )


def read_globalstate_untrusted(read: Read) -> GlobalState:
    """Decode a globalstate body of version 1.

    Before 8.2 QEMU had no suspended flag and a wider string area, of which the
    bytes behind a run state are zero too: one layout serves both.
    """
    size = fields.be32_untrusted(read)
    body = fields.take_untrusted(read, GLOBALSTATE_SIZE - 4)
    if not 1 <= size <= _RUN_STATE_SIZE or body[size - 1] != 0:
        raise StreamError("the run state does not end where it should", got=size)
    name = body[: size - 1]
    if not name.isascii() or 0 in name:
        raise StreamError("the run state is not a word", got=name)
    present, suspended = body[_RUN_STATE_SIZE : _RUN_STATE_SIZE + 2]
    return GlobalState(name.decode("ascii"), bool(present and suspended))


@dataclass(frozen=True, slots=True)
class Timer:
    """QEMU's clocks: signed offsets, in ticks and in nanoseconds."""

    ticks_offset: int
    clock_offset: int


def encode_timer(timer: Timer) -> bytes:
    return _signed64(timer.ticks_offset) + bytes(8) + _signed64(timer.clock_offset)


def read_timer_untrusted(read: Read) -> Timer:
    body = fields.take_untrusted(read, TIMER_SIZE)
    return Timer(
        int.from_bytes(body[:8], "big", signed=True),
        int.from_bytes(body[16:], "big", signed=True),
    )


def _signed64(value: int) -> bytes:
    try:
        return value.to_bytes(8, "big", signed=True)
    except OverflowError:
        raise ValueError(f"{value} does not fit in 8 signed bytes") from None


def encode_device_state(state: bytes) -> bytes:
    """The body of our own guests' sections: a be32 length and so many bytes."""
    if len(state) > c.MAX_DEVICE_STATE:
        raise ValueError(f"{len(state)} bytes of device state are too many")
    return fields.be32(len(state)) + state


def read_device_state_untrusted(read: Read) -> bytes:
    length = fields.be32_untrusted(read)
    fields.bounded("device state", length, c.MAX_DEVICE_STATE)
    return fields.take_untrusted(read, length)
