"""Files that QEMU and libvirt wrote, made into parked VMs.

Three kinds: a stream as a socket would carry it, a stream of mapped-ram, and an
image of `virsh save`, which is one of these two behind an XML. A file of
mapped-ram has each page at a place of its own, so it is used as it is where that
is possible: as the file `image` of the parked VM, which is a second name of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from common.errors import HostError, StreamError
from common.store import mapped, virsh
from common.store.loading import MappedRam, PlainRam
from common.store.manifest import IMAGE, Block
from common.store.parking import Parking
from common.store.reading import FileReader
from common.stream import command, fields, foreign, section, vmdesc
from common.stream import constants as c

if TYPE_CHECKING:
    from pathlib import Path

    from common.store.loading import RamSections

MAPPED_RAM: Final = "mapped-ram"
MAX_EARLY: Final = 1 << 20  # bytes of device state in front of RAM
MAX_ENDING: Final = c.MAX_PACKAGE + c.MAX_VMDESC

# What else one might take for a VM's state, by how it begins.
_OTHERS: Final = (
    (b"\x1f\x8b", "is compressed: unpack it with gzip -d"),
    (b"\xfd7zXZ\0", "is compressed: unpack it with xz -d"),
    (b"\x28\xb5\x2f\xfd", "is compressed: unpack it with zstd -d"),
    (b"BZh", "is compressed: unpack it with bzip2 -d"),
    (b"\x89LZO", "is compressed: unpack it with lzop -d"),
    (b"QFI\xfb", "is a disk image; snapshots within one are not read"),
    (
        b"\x7fELF",
        "is an ELF file, perhaps a core dump: those have no device state, so no VM can"
        " run from one",
    ),
    (
        fields.be32(c.MULTIFD_MAGIC),
        "is a channel of multifd, which is of no use without the others: save again"
        " with capability multifd off",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of a file. `in_place`: the VM's RAM is that file."""

    mapped: bool
    libvirt: bool
    in_place: bool
    punched: int  # pages of the file that were made holes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What comes in front of RAM."""

    configuration: section.Configuration
    raw: bytes  # the configuration as it came
    advised: bool
    section_id: int


async def import_file(path: Path, directory: Path, *, copy: bool = False) -> Imported:
    """Make the VM in file `path` a parked one in `directory`, new or empty.

    HostError says what is wrong with the file, and where; `directory` is left as
    it was then. `copy`: never use the file in place.
    """
    file = FileReader(path)
    try:
        with file.located():
            image = _libvirt_untrusted(file)
            head = _head_untrusted(file)
            with Parking.create(directory) as parking:
                try:
                    return await _fill(file, image, head, parking, copy=copy)
                except BaseException:
                    parking.discard()
                    raise
    finally:
        file.close()


async def _fill(
    file: FileReader,
    image: virsh.SaveImage | None,
    head: _Head,
    parking: Parking,
    *,
    copy: bool,
) -> Imported:
    is_mapped = MAPPED_RAM in head.configuration.capabilities
    parking.set_configuration(_plain_configuration(head), advised=head.advised)
    ram: RamSections
    if is_mapped:
        blocks = mapped.read_setup_untrusted(file)
        ram = MappedRam(file, head.section_id)
    else:
        blocks = ()
        ram = _plain_blocks(file, head, parking)
    try:
        section.read_footer_untrusted(file, head.section_id)
        early, sections, text = await _sections(file, ram, head)
    finally:
        ram.close()
    parking.set_early(early)
    # The file is right as far as one can tell, so it may be touched.
    in_place = is_mapped and not copy and _link(file, parking)
    punched = await _mapped_blocks(file, blocks, parking, in_place=in_place)
    state = foreign.run_state_untrusted(sections) or "running"
    if image:
        parking.set_description({"libvirt-xml": image.xml})
        # libvirt stops a VM before it saves it.
        state = "running" if image.running else "paused"
    await parking.commit(sections, text, state, f"imported from {file.path}")
    return Imported(
        mapped=is_mapped, libvirt=image is not None, in_place=in_place, punched=punched
    )


# --- in front of RAM -----------------------------------------------------------------


def _libvirt_untrusted(file: FileReader) -> virsh.SaveImage | None:
    """The head of a virsh save image, if the file begins with one."""
    begin = file.look(16)
    if begin not in (virsh.MAGIC, virsh.PARTIAL):
        return None
    return virsh.read_untrusted(file)


def _head_untrusted(file: FileReader) -> _Head:
    _known_untrusted(file)
    section.read_file_header_untrusted(file)
    begin = file.offset
    configuration, kind = section.read_configuration_untrusted(file)
    end = file.offset - 1
    file.seek(begin)
    raw = file(end - begin)
    _check_configuration(configuration)
    advised = False
    file.seek(end)
    while (kind := fields.u8_untrusted(file)) == c.QEMU_VM_COMMAND:
        match command.read_untrusted(file):
            case command.Advise(_, target_page):
                fields.expect("target page size", c.TARGET_PAGE_SIZE, target_page)
                advised = True
            case command.OpenReturnPath() | command.Ping():
                pass
            case other:
                raise StreamError("command that does not belong here", got=other)
    fields.expect("section type", c.QEMU_VM_SECTION_START, kind)
    section_id = _start_untrusted(file)
    return _Head(
        configuration=configuration, raw=raw, advised=advised, section_id=section_id
    )


def _known_untrusted(file: FileReader) -> None:
    begin = file.look(16)
    for magic, what in _OTHERS:
        if begin.startswith(magic):
            raise HostError(f"{file.path} {what}")
    if not begin:
        raise HostError(f"{file.path} is empty, or ends where a stream should begin")


def _check_configuration(configuration: section.Configuration) -> None:
    others = [name for name in configuration.capabilities if name != MAPPED_RAM]
    if others:
        raise StreamError(
            "the VM was saved with capabilities that are not understood here; save it"
            " again without them",
            got=", ".join(others),
        )
    fields.expect("target page bits", None, configuration.target_page_bits)


def _start_untrusted(file: FileReader) -> int:
    """RAM's START header, behind its type byte; the id of its section."""
    start = section.read_header_untrusted(file, c.QEMU_VM_SECTION_START)
    assert isinstance(start, section.Start)
    if (start.name, start.version) != (c.RAM_SECTION, c.RAM_SECTION_VERSION):
        raise StreamError(
            "the VM has a device whose state comes in parts, which cannot be parked;"
            " remove it and save again",
            got=start.name,
        )
    return start.section_id


def _plain_configuration(head: _Head) -> bytes:
    """As a stream of the same VM would have it that is no mapped-ram."""
    if not head.configuration.capabilities:
        return head.raw
    return section.encode_configuration(replace(head.configuration, capabilities=()))


# --- RAM -----------------------------------------------------------------------------


def _plain_blocks(file: FileReader, head: _Head, parking: Parking) -> PlainRam:
    blocks = foreign.read_ram_setup_untrusted(file, advised=head.advised)
    if not blocks:
        raise StreamError("the VM has no RAM")
    for block in blocks:
        parking.add_block(
            block.idstr, block.length, block.page_size or c.TARGET_PAGE_SIZE
        )
    rows = list(zip(parking.blocks, parking.fds, strict=True))
    return PlainRam(file, head.section_id, rows)


def _link(file: FileReader, parking: Parking) -> bool:
    """Make the file the parked VM's `image`; False if that is not possible."""
    try:
        # That very file, whatever its name means by now. Only with a src_dir_fd,
        # whichever, does os.link follow a symbolic link.
        os.link(f"/proc/self/fd/{file.fd}", parking.path / IMAGE, src_dir_fd=file.fd)
    except OSError:
        return False  # another file system, or not ours
    return True


async def _mapped_blocks(
    file: FileReader,
    blocks: tuple[mapped.MappedBlock, ...],
    parking: Parking,
    *,
    in_place: bool,
) -> int:
    """Add them; the number of pages that were punched out of the file."""
    punched = 0
    for block in blocks:
        if in_place:
            punched += await _punch_stale(file, block)
            parking.add_block_in_place(
                Block(
                    name=block.name,
                    length=block.length,
                    page_size=c.TARGET_PAGE_SIZE,
                    file=IMAGE,
                    offset=block.start,
                )
            )
        else:
            fd = parking.add_block(block.name, block.length, c.TARGET_PAGE_SIZE)
            await mapped.copy(file.fd, block, fd)
    return punched


async def _punch_stale(file: FileReader, block: mapped.MappedBlock) -> int:
    """Make holes of the pages that QEMU takes for zero and that hold other bytes."""
    if not await mapped.stale_pages(file.fd, block):
        return 0
    try:
        fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"{file.path} has pages that became zero, and cannot be written to, so it"
            f" cannot be used in place ({error.strerror}); import it with --copy"
        ) from None
    try:
        return await mapped.stale_pages(fd, block, punch=True)
    finally:
        os.close(fd)


# --- device state --------------------------------------------------------------------


async def _sections(
    file: FileReader, ram: RamSections, head: _Head
) -> tuple[bytes, bytes, bytes | None]:
    """From behind RAM's START to the end: early sections, the others, description."""
    early = b""
    while True:
        await ram.load()
        begin = file.offset
        kind = fields.u8_untrusted(file)
        match kind:
            case c.QEMU_VM_COMMAND:
                _command_untrusted(file)
            case c.QEMU_VM_SECTION_START:
                _start_untrusted(file)
                raise StreamError("RAM is started a second time")
            case c.QEMU_VM_SECTION_FULL if not ram.begun:
                file.seek(begin)
                early += _early_untrusted(file, head.section_id)
            case c.QEMU_VM_SECTION_FULL | c.QEMU_VM_EOF if ram.begun:
                file.seek(begin)
                return early, *_ending_untrusted(file, early)
            case _:
                raise StreamError("unexpected section type", got=kind)


def _command_untrusted(file: FileReader) -> None:
    match command.read_untrusted(file):
        case command.SwitchoverStart() | command.Ping():
            pass
        case command.Packaged() | command.RamDiscard():
            raise StreamError(
                "this is a record of a postcopy migration: most of the RAM is missing"
            )
        case other:
            raise StreamError("command that does not belong here", got=other)


def _early_untrusted(file: FileReader, ram_id: int) -> bytes:
    """The FULL section that begins here."""
    ahead = file.look(MAX_EARLY)
    end = foreign.end_of_section_untrusted(ahead, ram_id)
    if end is None:
        raise StreamError("device state in front of RAM does not end")
    return file(end)


def _ending_untrusted(file: FileReader, early: bytes) -> tuple[bytes, bytes | None]:
    """FULL sections and description, which are all that is left of the file.

    Zero bytes behind the description are padding. Without a description the last
    section must be the one that QEMU sends last.
    """
    tail = file.look(MAX_ENDING + 1)
    fields.bounded("end of the stream", len(tail), MAX_ENDING)
    ending = vmdesc.split_ending_untrusted(tail.rstrip(b"\0"), early)
    if ending is not None:
        return ending.area, ending.text
    sections = tail.removesuffix(section.EOF)
    if len(sections) < len(tail) and foreign.ends_with_globalstate_untrusted(sections):
        return sections, None
    raise StreamError(
        "the device state that begins here is damaged or cut off: it does not fit the"
        " description at the end of the file, or there is none"
    )
