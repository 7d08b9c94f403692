"""Files that are imported: hand-made streams, right ones and wrong ones."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import saved
from support.saved_streams import (
    DATA,
    DEVICE,
    DICE,
    EARLY,
    ENDING,
    GLOBALSTATE,
    LENGTH,
    PAGE,
    PAGES,
    PLAIN,
    RAM,
    RAM_ID,
    SETUP,
    SWITCHOVER,
    TEXT,
    TEXT_EARLY,
    head,
    mapped_file,
    part,
    start,
)
from support.small_disk import in_small_disk, needs_mounts

from common.errors import HostError, StreamError
from common.store import importing, virsh
from common.store.directory import Parked
from common.stream import command, fields, ram, section, vmdesc
from common.stream import constants as c

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder for tests that import hundreds of times: a disk has to be waited for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


async def bring(path: Path, content: bytes, **options: Any) -> importing.Imported:
    (path / "file").write_bytes(content)
    return await importing.import_file(path / "file", path / "vm", **options)


async def refuse(path: Path, content: bytes, words: str) -> None:
    """It is refused in these words, and no directory is left."""
    with pytest.raises(HostError, match=words) as raised:
        await bring(path, content)
    assert str(path / "file") in str(raised.value)
    assert not (path / "vm").exists()


def check_ram(parked: Parked) -> None:
    rows = zip(parked.manifest.blocks, parked.blocks(), strict=True)
    for block, fd in rows:
        for page in range(block.length // PAGE):
            found = os.pread(fd, PAGE, block.offset + page * PAGE)
            assert found == DATA.get((block.name, page), bytes(PAGE)), (block, page)


# --- plain streams -------------------------------------------------------------------


async def test_a_plain_stream(tmp_path: Path):
    done = await bring(tmp_path, PLAIN)
    assert (done.mapped, done.in_place, done.libvirt) == (False, False, False)
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        check_ram(parked)
        assert parked.manifest.machine == "pc-q35-10.0"
        assert parked.manifest.run_state == "paused"
        assert not parked.manifest.advised
        assert parked.manifest.devices == ("thing", "globalstate")
        assert parked.manifest.origin == f"imported from {tmp_path / 'file'}"
        assert head() == section.FILE_HEADER + parked.configuration
        assert parked.device_state == DEVICE + GLOBALSTATE
        assert parked.vmdesc == TEXT
        assert parked.early == b""


async def test_what_comes_early(tmp_path: Path):
    ending = DEVICE + GLOBALSTATE + section.EOF + vmdesc.encode(TEXT_EARLY)
    stream = head() + SETUP + EARLY + PAGES + part(end=True) + ending
    await bring(tmp_path, stream)
    with Parked.open(tmp_path / "vm") as parked:
        assert parked.early == EARLY
        assert parked.device_state == DEVICE + GLOBALSTATE
        check_ram(parked)


async def test_a_background_snapshot_has_no_end(tmp_path: Path):
    await bring(tmp_path, head() + SETUP + PAGES + ENDING)
    with Parked.open(tmp_path / "vm") as parked:
        check_ram(parked)


async def test_without_description(tmp_path: Path):
    stream = head() + RAM + DEVICE + GLOBALSTATE + section.EOF
    await bring(tmp_path, stream)
    with Parked.open(tmp_path / "vm") as parked:
        assert parked.device_state == DEVICE + GLOBALSTATE
        assert parked.vmdesc is None


async def test_zeroes_behind_the_description_are_padding(tmp_path: Path):
    await bring(tmp_path, PLAIN + bytes(5000))
    with Parked.open(tmp_path / "vm") as parked:
        assert parked.vmdesc == TEXT


async def test_advised(tmp_path: Path):
    """An ADVISE, and with it pages of 2 MiB in the block list."""
    blocks = [
        section.BlockEntry(idstr="huge", length=4 << 20, page_size=2 << 20),
        section.BlockEntry(idstr="rom", length=PAGE),
    ]
    setup = section.encode_section(start(), section.encode_ram_setup(blocks))
    orders = b"".join(
        map(
            command.encode,
            (
                command.OpenReturnPath(),
                command.Ping(1),
                command.Advise(0x201000),
            ),
        )
    )
    data = DICE.randbytes(PAGE)
    pages = part(ram.Page(3 * PAGE, "huge", data), end=True)
    await bring(tmp_path, head() + orders + setup + pages + ENDING)
    with Parked.open(tmp_path / "vm") as parked:
        assert parked.manifest.advised
        assert [b.page_size for b in parked.manifest.blocks] == [2 << 20, PAGE]
        assert os.pread(parked.blocks()[0], PAGE, 3 * PAGE) == data


def test_more_blocks_than_descriptors(tmp_path: Path):
    """Each takes several; the verbs raise the limit that shells begin with."""
    names = [f"block {number}" for number in range(300)]
    setup = section.encode_ram_setup(
        [section.BlockEntry(idstr=name, length=PAGE) for name in names]
    )
    pages = part(*(ram.Page(0, name, DATA["rom", 1]) for name in names), end=True)
    stream = head() + section.encode_section(start(), setup) + pages + ENDING
    (tmp_path / "file").write_bytes(stream)
    for verb in (f"import {tmp_path}/file", "verify"):
        subprocess.run(
            ["sh", "-c", f"ulimit -Sn 256; srcd {verb} {tmp_path}/vm"],
            check=True,
            capture_output=True,
            timeout=60,
        )


async def test_an_empty_directory_stays(tmp_path: Path):
    (tmp_path / "vm").mkdir()
    with pytest.raises(HostError):
        await bring(tmp_path, PLAIN[:-1])
    assert os.listdir(tmp_path / "vm") == []
    await bring(tmp_path, PLAIN)
    with pytest.raises(HostError, match="holds a parked VM already"):
        await bring(tmp_path, PLAIN)
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()


async def test_cuts_are_refused(in_memory: Path):
    """But for the one behind EOF: then only the description is missing."""
    whole = len(PLAIN) - len(vmdesc.encode(TEXT))
    ends = {
        *range(0, 400),
        *range(len(head()), len(PLAIN), 397),
        *range(whole, len(PLAIN)),
    }
    for length in sorted(ends - {whole}):
        await refuse(in_memory, PLAIN[:length], "cut off|empty|not a migration stream")
    await bring(in_memory, PLAIN[:whole])


async def test_flips_of_the_skeleton(in_memory: Path):
    """Refused, or what differs is bytes that nothing in a stream can tell of."""
    skeleton = [
        at
        for at in range(len(PLAIN))
        if not _is_inside(at, [b"x" * PAGE, *DATA.values(), b"state" * 20])
    ]
    accepted = set()
    for at in DICE.sample(skeleton, 300):
        broken = bytearray(PLAIN)
        broken[at] ^= 1 << DICE.randrange(8)
        try:
            await bring(in_memory, bytes(broken))
        except HostError:
            assert not (in_memory / "vm").exists()
            continue
        accepted.add(at)
        with Parked.open(in_memory / "vm") as parked:
            parked.verify()
        for name in os.listdir(in_memory / "vm"):
            os.unlink(in_memory / "vm" / name)
        os.rmdir(in_memory / "vm")
    # Names, numbers, places of pages, the insides of devices.
    assert len(accepted) < 150
    # What frames all that: file header, type bytes, footers.
    assert not accepted & {*range(9), len(head()), len(head() + SETUP) - 5}


def _is_inside(at: int, pieces: list[bytes]) -> bool:
    return any(0 <= at - PLAIN.find(piece) < len(piece) for piece in pieces)


# --- what cannot be read -------------------------------------------------------------

_PACKAGED = command.encode(command.Packaged(5)) + b"12345"
_DISCARD = command.encode(command.RamDiscard("pc.ram", ((0, PAGE),)))
_SHARED = head("x-ignore-shared")
_COMPRESSED = fields.be64(5 * PAGE | 0x100) + fields.name("pc.ram") + b"...."
_XBZRLE = fields.be64(5 * PAGE | 0x40) + fields.name("pc.ram") + b"...."


def _part_of(record: bytes) -> bytes:
    return section.encode(section.Part(section_id=RAM_ID)) + record


NAMED = {
    "nothing": (b"", "is empty"),
    "text": (b"Hello, world\n" * 5, "magic"),
    "gzip": (b"\x1f\x8b\x08" + PLAIN, "gzip -d"),
    "xz": (b"\xfd7zXZ\0" + PLAIN, "xz -d"),
    "zstd": (b"\x28\xb5\x2f\xfd" + PLAIN, "zstd -d"),
    "bzip2": (b"BZh9" + PLAIN, "bzip2 -d"),
    "lzop": (b"\x89LZO\0" + PLAIN, "lzop -d"),
    "qcow2": (b"QFI\xfb" + PLAIN, "disk image"),
    "ELF": (b"\x7fELF" + PLAIN, "core dump"),
    "multifd": (fields.be32(c.MULTIFD_MAGIC) + PLAIN, "multifd off"),
    "old version": (b"QEVM\0\0\0\2" + PLAIN, "stream version"),
    "x-ignore-shared": (_SHARED + RAM + ENDING, "capabilities.*x-ignore-shared"),
    "vfio": (
        head() + section.encode(start("0000:00:05.0/vfio", 1)),
        "state comes in parts.*vfio",
    ),
    "dirty bitmaps": (
        head() + SETUP + section.encode(start("dirty-bitmap", 1)),
        "state comes in parts.*dirty-bitmap",
    ),
    "another RAM": (head() + section.encode(start(version=3)), "comes in parts"),
    "RAM twice": (head() + SETUP + SETUP, "a second time"),
    "xbzrle": (head() + SETUP + _part_of(_XBZRLE), "capability xbzrle off"),
    "compress": (head() + SETUP + _part_of(_COMPRESSED), "capability compress off"),
    "package": (head() + SETUP + PAGES + _PACKAGED, "postcopy"),
    "discard": (head() + SETUP + PAGES + _DISCARD, "discard|postcopy"),
    "listen": (
        head() + command.encode(command.Listen()) + RAM,
        "does not belong",
    ),
    "device first": (head() + DEVICE + RAM, "section type"),
    "no RAM": (
        head() + section.encode_section(start(), section.encode_ram_setup([])),
        "no RAM",
    ),
    "early without end": (head() + SETUP + EARLY[:-5], "does not end|cut off"),
    "a page of no block": (
        head() + SETUP + part(ram.Zero(0, "other")),
        "block that this guest does not have",
    ),
    "a page past the end": (
        head() + SETUP + part(ram.Zero(LENGTH, "pc.ram")),
        "past the end",
    ),
    "another description": (
        head() + RAM + DEVICE + section.EOF + vmdesc.encode(TEXT),
        "damaged or cut off",
    ),
    "something behind": (PLAIN + b"more", "damaged or cut off"),
}


@pytest.mark.parametrize("name", NAMED)
async def test_what_cannot_be_read_is_named(tmp_path: Path, name: str):
    content, words = NAMED[name]
    await refuse(tmp_path, content, words)


async def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "is not a file"), ("none", "No such file")):
        with pytest.raises(HostError, match=words):
            await importing.import_file(tmp_path / name, tmp_path / "vm")
    with pytest.raises(HostError, match="is not a file"):
        await importing.import_file(tmp_path, tmp_path / "vm")


# --- mapped-ram ----------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
async def test_mapped_ram(tmp_path: Path, copy: bool):
    done = await bring(tmp_path, mapped_file(), copy=copy)
    assert (done.mapped, done.in_place, done.punched) == (True, not copy, 0)
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        check_ram(parked)
        # As a stream without that capability has it.
        assert section.FILE_HEADER + parked.configuration == head()
        file = (tmp_path / "file").stat()
        inodes = {os.fstat(fd).st_ino for fd in parked.blocks()}
        assert (file.st_ino in inodes) is not copy


async def test_stale_pages_are_punched_out(tmp_path: Path):
    """QEMU leaves a page's old bytes where they were when it becomes zero."""
    done = await bring(tmp_path, mapped_file(stale=True))
    assert (done.in_place, done.punched) == (True, 1)
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        check_ram(parked)
    # Nothing else of the file has changed.
    assert (tmp_path / "file").read_bytes() == mapped_file()


async def test_a_copy_leaves_stale_pages_where_they_are(tmp_path: Path):
    await bring(tmp_path, mapped_file(stale=True), copy=True)
    assert (tmp_path / "file").read_bytes() == mapped_file(stale=True)
    with Parked.open(tmp_path / "vm") as parked:
        check_ram(parked)


async def test_a_file_in_place_is_verified(tmp_path: Path):
    """Every byte of RAM counts; the rest of the file is not used any more."""
    await bring(tmp_path, mapped_file())
    size = len(mapped_file())
    with Parked.open(tmp_path / "vm") as parked:
        inside = [range(b.offset, b.offset + b.length) for b in parked.manifest.blocks]
    found = 0
    for _ in range(300):
        at = DICE.randrange(size)
        _flip(tmp_path / "file", at)
        with Parked.open(tmp_path / "vm") as parked:
            if any(at in one for one in inside):
                found += 1
                with pytest.raises(HostError, match="image: RAM block"):
                    parked.verify()
            else:
                parked.verify()
                check_ram(parked)
        _flip(tmp_path / "file", at)
    assert 0 < found < 300


def _flip(path: Path, at: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


async def test_a_file_in_place_may_be_removed_but_not_cut(tmp_path: Path):
    await bring(tmp_path, mapped_file())
    os.truncate(tmp_path / "file", 10 * PAGE)
    with pytest.raises(HostError, match="image is cut off"):
        Parked.open(tmp_path / "vm")
    await importing.import_file(_write(tmp_path / "2"), tmp_path / "vm2")
    (tmp_path / "2").unlink()
    with Parked.open(tmp_path / "vm2") as parked:
        parked.verify()


def _write(path: Path) -> Path:
    path.write_bytes(mapped_file())
    return path


async def test_cuts_of_a_mapped_file_are_refused(in_memory: Path):
    file = mapped_file()
    for length in (*range(0, 200), *range(200, len(file), 1009), len(file) - 1):
        await refuse(in_memory, file[:length], "cut off|empty|not a migration stream")


def _word(file: bytes, name: str, place: int) -> int:
    """Where the be64 at `place` behind a block's name is."""
    return file.index(fields.name(name)) + 1 + len(name) + place


WRONG_ENTRIES = {
    "length 0": (0, 0, "not made of whole pages"),
    "half a page": (0, 100, "not made of whole pages"),
    "longer than all": (0, 1 << 40, "RAM block pc.ram"),
    "page size": (12, 8192, "mapped-ram page size"),
    "bitmap elsewhere": (20, 4096, "place of the bitmap"),
    "pages on the bitmap": (28, 0, "at an odd place"),
    "pages not at a page": (28, 5000, "at an odd place"),
    "pages behind the end": (28, 1 << 40, "are cut off"),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
async def test_entries_are_checked(tmp_path: Path, name: str):
    place, value, words = WRONG_ENTRIES[name]
    file = bytearray(mapped_file())
    at = _word(bytes(file), "pc.ram", place)
    file[at : at + 8] = fields.be64(value)
    await refuse(tmp_path, bytes(file), words)


async def test_bits_past_the_end_of_a_block(tmp_path: Path):
    file = bytearray(mapped_file())
    file[_word(bytes(file), "pc.ram", 36) + 5] |= 1
    await refuse(tmp_path, bytes(file), "pages past its end")


async def test_a_page_in_the_stream_of_a_mapped_file(tmp_path: Path):
    file = mapped_file().replace(
        part() + SWITCHOVER, part(ram.Zero(0, "pc.ram")) + SWITCHOVER
    )
    await refuse(tmp_path, file, "a page within the stream")


async def test_random_damage_of_a_mapped_file(in_memory: Path):
    """Refused, or a VM that verifies; never anything else."""
    file = mapped_file()
    refused = 0
    for number in range(300):
        broken = bytearray(file)
        reach = (200, len(file))[number % 2]
        for _ in range(DICE.randrange(1, 4)):
            broken[DICE.randrange(reach)] ^= 1 << DICE.randrange(8)
        (in_memory / "file").write_bytes(broken)
        vm = in_memory / f"vm{number}"
        try:
            await importing.import_file(in_memory / "file", vm)
        except HostError:
            refused += 1
            assert not vm.exists()
            continue
        with Parked.open(vm) as parked:
            parked.verify()
        (in_memory / "file").unlink()
    assert 20 < refused < 300


# --- a full disk ---------------------------------------------------------------------

_IMPORTING = """
import sys, trio
from pathlib import Path
from common.errors import HostError
from common.store.directory import Parked
from common.store.importing import import_file
file, vm = Path(sys.argv[1]), Path(sys.argv[2]) / "vm"
try:
    trio.run(import_file, file, vm)
    with Parked.open(vm) as parked:
        parked.verify()
        print("whole")
except HostError as error:
    print("refused:", error, vm.exists())
"""


@needs_mounts
@pytest.mark.parametrize("content", [PLAIN, mapped_file()], ids=["plain", "mapped"])
def test_a_full_disk(tmp_path: Path, content: bytes):
    """However small it is: an error, and the place is left as it was."""
    (tmp_path / "program.py").write_text(_IMPORTING)
    (tmp_path / "file").write_bytes(content)
    said = []
    for kilobytes in range(4, 100, 12):
        ran = in_small_disk(
            tmp_path, kilobytes, tmp_path / "program.py", tmp_path / "file"
        )
        if ran.startswith("refused:"):
            assert "No space left" in ran, ran
            assert ran.endswith("False\n")
        said.append(ran.split(":")[0].strip())
    assert said.count("refused") > 1
    assert said.count("whole") > 1
    assert said == sorted(said), "once there is room, there is room"


# --- virsh save ----------------------------------------------------------------------

# As libvirt 9.0.0 wrote it, `virsh save` with format raw; the rest of it is zero.
LIBVIRT_HEAD = bytes.fromhex(
    "4c69627669727451656d756453617665 02000000 08060100 01000000 00000000 1c050000"
)
LIBVIRT_STREAM = 92 + 0x10608


def libvirt_image() -> bytes:
    xml = Path(saved.__file__).with_name("libvirt-9.0.xml").read_bytes()
    xml, begin, cookie = xml.partition(b"<cookie>")
    head = LIBVIRT_HEAD.ljust(92, b"\0") + xml + b"\0" + begin + cookie
    return head.ljust(LIBVIRT_STREAM, b"\0")


async def test_an_image_of_libvirt_itself(tmp_path: Path):
    await bring(tmp_path, libvirt_image() + PLAIN)
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        xml = parked.description["libvirt-xml"]
        assert parked.manifest.run_state == "running"
    assert xml.startswith("<domain type='qemu'>\n  <name>web1</name>")
    assert xml.endswith("</domain>\n")
    assert "cookie" not in xml


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("running", [True, False])
async def test_a_virsh_save_image(tmp_path: Path, order: str, running: bool):
    image = saved.virsh_head(order=order, running=running) + PLAIN
    done = await bring(tmp_path, image)
    assert done.libvirt
    with Parked.open(tmp_path / "vm") as parked:
        check_ram(parked)
        assert parked.description == {"libvirt-xml": saved.XML}
        assert parked.manifest.run_state == ("running" if running else "paused")


WRONG_HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "unfinished": ({"magic": b"LibvirtQemudPart"}, "did not finish writing"),
    "version": ({"version": 3}, "unknown version"),
    "gzip": ({"kind": 1}, "gzip -d"),
    "zstd": ({"kind": 5}, "zstd -d"),
    "compressed somehow": ({"kind": 77}, "unknown way"),
    "no XML": ({"xml": b"hello"}, "no XML"),
    "long XML": ({"xml": b"<" * virsh.MAX_DATA}, "XML of a virsh save image"),
}


@pytest.mark.parametrize("name", WRONG_HEADS)
async def test_virsh_heads_are_checked(tmp_path: Path, name: str):
    options, words = WRONG_HEADS[name]
    await refuse(tmp_path, saved.virsh_head(**options) + PLAIN, words)


async def test_cuts_of_a_virsh_head(tmp_path: Path):
    image = saved.virsh_head() + PLAIN
    for length in (*range(1, 200), *range(200, len(image), 4099)):
        await refuse(tmp_path, image[:length], "cut off|empty|not a migration|magic")


async def test_what_follows_the_head_is_named(tmp_path: Path):
    await refuse(tmp_path, saved.virsh_head() + b"\x1f\x8b" + PLAIN, "gzip -d")
    await refuse(tmp_path, saved.virsh_head(), "ends where a stream should begin")


def test_a_virsh_head_by_itself():
    image = virsh.read_untrusted(fields.over(saved.virsh_head(running=False)))
    assert image == virsh.SaveImage(xml=saved.XML, running=False)
    with pytest.raises(StreamError, match="not an image"):
        virsh.read_untrusted(fields.over(PLAIN))
