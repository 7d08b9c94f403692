"""dstd --park against streams written by hand, and against srcd.

What QEMU sends is in tests/conformance/test_park.py. Here is what it never would,
or not before there is a machine for it: many blocks, odd names, lies.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from support.daemons import Destination, Source, move_postcopy, prepare

from common.errors import HostError
from common.store.directory import Parked
from common.stream import (
    bitmap,
    command,
    constants,
    fields,
    package,
    ram,
    returnpath,
    section,
    vmdesc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MIB = 1 << 20
PAGE = 4096
RAM = 2
SHUT = returnpath.encode(returnpath.Shut(0))
REFUSED = returnpath.encode(returnpath.Shut(1))
OPEN = command.encode(command.OpenReturnPath())
ADVISE = command.encode(command.Advise(PAGE, PAGE))
PLACES = (
    "/",
    "..",
    "../../etc/passwd",
    "manifest.json",
    "ram-0000",
    "a" * 255,
    "ü\N{SNOWMAN}",
)


def head(machine: str = "pc-i440fx-10.0") -> bytes:
    return section.FILE_HEADER + section.encode_configuration(
        section.Configuration(machine=machine)
    )


def start(blocks: Sequence[section.BlockEntry], name: str = "ram") -> bytes:
    header = section.Start(section_id=RAM, name=name, instance=0, version=4)
    return section.encode_section(header, section.encode_ram_setup(blocks))


def entry(
    name: str, pages: int = 4, page_size: int | None = None
) -> section.BlockEntry:
    return section.BlockEntry(
        idstr=name, length=pages * (page_size or PAGE), page_size=page_size
    )


def page(block: str, number: int, fill: int) -> bytes:
    return ram.encode(ram.Page(number * PAGE, block, bytes([fill]) * PAGE))


def part(*records: bytes, end: bool = False) -> bytes:
    header = (section.End if end else section.Part)(section_id=RAM)
    return section.encode_section(
        header, b"".join(records) + fields.be64(constants.RAM_SAVE_FLAG_EOS)
    )


def full(name: str, body: bytes, section_id: int = 40) -> bytes:
    header = section.Full(section_id=section_id, name=name, instance=0, version=1)
    return section.encode_section(header, body)


def devices(run_state: str = "running") -> bytes:
    state = section.encode_globalstate(section.GlobalState(run_state))
    return full("clock", b"\x7e\0\6 tick", 3) + full("globalstate", state)


TWO = [entry("a"), entry("b")]
DESCRIPTION = vmdesc.encode(
    vmdesc.describe(
        [
            vmdesc.Device(
                name="clock", instance=0, version=1, fields=(vmdesc.Field("t", "b", 8),)
            ),
            vmdesc.GLOBALSTATE,
        ]
    )
)


class Wire:
    """A source: what it sends, and what it is told."""

    def __init__(self, directory: Path, dstd: Destination) -> None:
        self.directory = directory
        self.dstd = dstd
        self.uri = dstd.listen()
        self.sock = self.connect()

    def connect(self) -> socket.socket:
        _, host, port = self.uri.split(":")
        sock = socket.create_connection((host, int(port)))
        sock.settimeout(30)
        return sock

    def send(self, *pieces: bytes) -> None:
        with suppress(ConnectionError):
            self.sock.sendall(b"".join(pieces))

    def told(self, size: int) -> bytes:
        found = b""
        while len(found) < size and (more := self.sock.recv(size - len(found))):
            found += more
        return found

    def failed(self) -> str:
        """It went away, once it was told."""
        self.sock.close()
        assert self.dstd.wait_status("completed", "failed") == "failed"
        with pytest.raises(HostError):
            Parked.open(self.directory)
        return str(self.dstd.query()["error-desc"])

    def completed(self) -> Parked:
        """Likewise."""
        assert self.told(len(SHUT)) == SHUT
        self.sock.close()
        status = self.dstd.wait_status("completed", "failed")
        assert status == "completed", self.dstd.query()
        parked = Parked.open(self.directory)
        parked.verify()
        return parked


@contextmanager
def wired(where: Path, *options: str) -> Iterator[Wire]:
    with Destination(where, "--park", str(where / "vm"), *options) as dstd:
        dstd.set_capabilities()
        wire = Wire(where / "vm", dstd)
        with wire.sock:
            yield wire


def content(parked: Parked, number: int) -> bytes:
    block = parked.manifest.blocks[number]
    return (parked.path / block.file).read_bytes()


# --- whatever it is ------------------------------------------------------------


def test_names_are_not_paths(private_dir: Path) -> None:
    blocks = [entry(name) for name in PLACES]
    with wired(private_dir) as wire:
        wire.send(head(), OPEN, start(blocks))
        wire.send(*(part(page(name, 1, n + 1)) for n, name in enumerate(PLACES)))
        wire.send(part(end=True), devices("paused"), section.EOF, DESCRIPTION)
        with wire.completed() as parked:
            assert tuple(b.name for b in parked.manifest.blocks) == PLACES
            for n in range(len(PLACES)):
                zero = bytes(PAGE)
                filled = bytes([n + 1]) * PAGE
                assert content(parked, n) == zero + filled + 2 * zero
            assert parked.device_state == devices("paused")
            assert parked.manifest.devices == ("clock", "globalstate")
            assert parked.manifest.run_state == "paused"
    names = {path.name for path in private_dir.rglob("*")}
    assert not names & {"etc", "passwd", ".."}


def test_a_thousand_blocks(private_dir: Path) -> None:
    """More than descriptors that a process has at first."""
    blocks = [entry(f"block {n}", 1) for n in range(1000)]
    with wired(private_dir) as wire:
        wire.send(head(), OPEN, start(blocks))
        wire.send(part(page("block 999", 0, 7), end=True), devices(), section.EOF)
        wire.send(DESCRIPTION)
        with wire.completed() as parked:
            assert len(parked.manifest.blocks) == 1000
            assert content(parked, 999) == b"\7" * PAGE


def test_huge_pages_arrive_in_parts(private_dir: Path) -> None:
    """One that was begun in precopy ends in postcopy."""
    with wired(private_dir) as wire:
        blocks = [entry("huge", 1, 2 * MIB), entry("small", 2)]
        wire.send(head("q35"), OPEN, command.encode(command.Advise(0x201000, PAGE)))
        wire.send(start(blocks), part(page("huge", 1, 1), page("small", 0, 2)))
        wire.send(part(page("huge", 2, 1)))
        wire.send(*map(command.encode, command.discards("huge", [(0, 2 * MIB)])))
        state = package.Package(sections=devices(), pings=(3,), listen=True, run=True)
        blob = package.encode_package(state)
        wire.send(command.encode(command.Packaged(len(blob))), blob)
        wire.send(part(*(page("huge", n, 3) for n in range(512)), end=True))
        wire.send(section.EOF)
        pong = returnpath.encode(returnpath.Pong(3))
        assert wire.told(len(pong)) == pong
        with wire.completed() as parked:
            assert [b.page_size for b in parked.manifest.blocks] == [2 * MIB, PAGE]
            assert content(parked, 0) == b"\3" * (2 * MIB)
            assert content(parked, 1) == b"\2" * PAGE + bytes(PAGE)
            assert parked.device_state == devices()
            assert parked.manifest.advised


def test_a_stray_connection(private_dir: Path) -> None:
    """In the place of a preempt channel, and it says what is none of its business."""
    with wired(private_dir) as wire:
        wire.send(head(), OPEN, ADVISE, start(TWO), part(page("a", 0, 1)))
        with wire.connect() as stray:
            stray.sendall(page("b", 0, 0x66) + b"GET / HTTP/1.1\r\n\r\n")
        wire.send(*map(command.encode, command.discards("b", [(0, 4 * PAGE)])))
        state = package.Package(sections=devices(), pings=(), listen=True, run=True)
        blob = package.encode_package(state)
        wire.send(command.encode(command.Packaged(len(blob))), blob)
        wire.send(part(*(page("b", n, 7) for n in range(4)), end=True), section.EOF)
        with wire.completed() as parked:
            assert content(parked, 0) == b"\1" * PAGE + bytes(3 * PAGE)
            assert content(parked, 1) == b"\7" * (4 * PAGE)


def test_killed_when_its_source_has_let_go(private_dir: Path) -> None:
    """Without a return path that is when it has sent all: then nothing goes away."""
    with wired(private_dir) as wire:
        (wire.directory / "manifest.json.new").mkdir()
        wire.send(head(), start(TWO), part(page("a", 1, 7), end=True))
        wire.send(devices(), section.EOF, DESCRIPTION)
        deadline = time.monotonic() + 30
        while "not parked yet" not in str(wire.dstd.query().get("error-desc")):
            assert time.monotonic() < deadline, wire.dstd.said
        wire.dstd.end()
        wire.dstd.start()
        assert wire.dstd.query()["status"] == "failed"
        assert "see whether it runs at the source" in wire.dstd.query()["error-desc"]
    ram = (wire.directory / "ram-0000").read_bytes()
    assert ram[PAGE : 2 * PAGE] == b"\7" * PAGE


# --- lies ----------------------------------------------------------------------

LIES = {
    "no such machine's name": (
        [section.FILE_HEADER + b"\7" + fields.be32(1 << 20)],
        "machine name is too large",
    ),
    "more RAM than fits": (
        [head(), OPEN, start([entry("a", 1 << 39)])],
        "make room on that file system, or start dstd with --overcommit",
    ),
    "another target page": (
        [head(), OPEN, command.encode(command.Advise(PAGE, 8192))],
        "wrong target page size",
    ),
    "a block twice": ([head(), OPEN, start([entry("a"), entry("a")])], "repeated RAM"),
    "another section": (
        [head(), OPEN, start(TWO, name="vfio")],
        "got vfio",
    ),
    "one more section in parts": (
        [head(), OPEN, start(TWO), start(TWO, name="slirp")],
        "got slirp",
    ),
    "RAM twice": ([head(), OPEN, start(TWO), start(TWO)], "a second time"),
    "a page of no block": (
        [head(), OPEN, start(TWO), part(page("c", 0, 1))],
        "that this guest does not have",
    ),
    "a page behind its block": (
        [head(), OPEN, start(TWO), part(page("a", 4, 1))],
        "past the end",
    ),
    "compressed pages": (
        [head(), OPEN, start(TWO), part(fields.be64(0x100))],
        "switch capability compress off",
    ),
    "EOF and nothing else": (
        [head(), OPEN, start(TWO), part(end=True), section.EOF, b"\6" + bytes(4)],
        "device",
    ),
    "multifd": ([fields.be32(constants.MULTIFD_MAGIC) + bytes(60)], "multifd on"),
}


@pytest.mark.parametrize("lie", LIES)
def test_refused(private_dir: Path, lie: str) -> None:
    pieces, sentence = LIES[lie]
    with wired(private_dir) as wire:
        wire.send(*pieces)
        if OPEN in pieces:
            assert wire.told(len(REFUSED)) == REFUSED
        assert sentence in wire.failed()
    assert not wire.directory.exists()


def test_overcommit(private_dir: Path) -> None:
    """Holes take no room."""
    room = os.statvfs(private_dir)
    pages = room.f_bavail * room.f_frsize // PAGE + (1 << 18)
    with wired(private_dir, "--overcommit") as wire:
        wire.send(head(), OPEN, start([entry("a", pages)]))
        wire.send(part(page("a", 1, 1)), part(end=True), devices(), section.EOF)
        wire.send(DESCRIPTION)
        wire.completed().close()
        assert (wire.directory / "ram-0000").stat().st_size == pages * PAGE


def test_device_state_again_behind_the_package(private_dir: Path) -> None:
    """It must not make a VM of what has not come: it pauses instead."""
    with wired(private_dir) as wire:
        wire.send(head(), OPEN, ADVISE, start(TWO), part(page("a", 0, 1)))
        wire.send(*map(command.encode, command.discards("a", [(0, 4 * PAGE)])))
        state = package.Package(sections=devices(), pings=(), listen=True, run=True)
        blob = package.encode_package(state)
        wire.send(command.encode(command.Packaged(len(blob))), blob)
        wire.send(devices(), section.EOF, DESCRIPTION)
        wire.dstd.wait_status("postcopy-paused")
        with pytest.raises(HostError, match="is incomplete"):
            Parked.open(wire.directory)
        bits = [bitmap.encode(bits.to_bytes(8, "little"), 4) for bits in (0, 15)]
        names = [returnpath.encode(returnpath.RecvBitmap(name)) for name in "ab"]
        answers = names[0] + bits[0] + names[1] + bits[1]
        answers += returnpath.encode(returnpath.ResumeAck())
        with wire.connect() as wire.sock:
            resume = [command.RecvBitmap("a"), command.RecvBitmap("b")]
            wire.send(*map(command.encode, resume), command.encode(command.Resume()))
            assert wire.told(len(answers)) == answers
            wire.send(part(*(page("a", n, 5) for n in range(4)), end=True), section.EOF)
            wire.completed().close()


# --- from srcd -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "preempt"])
def test_from_srcd(private_dir: Path, mode: str) -> None:
    names = {
        "precopy": (),
        "postcopy": ("postcopy-ram",),
        "preempt": ("postcopy-ram", "postcopy-preempt"),
    }[mode]
    words = ("--memory", "64M", "--accel", "process")
    with (
        Source(private_dir, *words, "--append", "write-rate=5M") as src,
        Destination(private_dir, "--park", str(private_dir / "vm")) as dst,
    ):
        src.wait_filled()
        prepare(src, dst)
        src.set_capabilities(*names)
        src.set_parameters(max_bandwidth=0 if mode == "precopy" else 32 * MIB)
        if mode == "precopy":
            src.migrate(dst.listen())
            assert src.wait_status("completed", "failed") == "completed", src.query()
            assert dst.wait_status("completed", "failed") == "completed", dst.query()
        else:
            move_postcopy(src, dst, after_bytes=4 * MIB)
            assert dst.ours["postcopy-pages"] > 0
        whole = private_dir / "whole"
        src.execute("pmemsave", val=0, size=64 * MIB, filename=str(whole))
        with Parked.open(private_dir / "vm") as parked:
            parked.verify()
            assert content(parked, 0) == whole.read_bytes()
            assert parked.device_state
