"""A whole PC whose CPU counts, parked in a directory, and what serves it.

    place = copied(originals, "10", folder)
    with place.server() as srcd, place.machine() as qemu:
        start_slowly(srcd, qemu, "plain")
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        assert_unharmed(place, qemu)

The CPU adds to a word of each of 128 pages, in a circle: a page that was lost, or
is an older one, is out of step with the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import counting_guest
from support.daemons import Destination, Source
from support.machine import MAIN, Machine
from support.ram import MIB, PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MEMORY = 32 * MIB
COUNTED = (counting_guest.LAST - counting_guest.FIRST) // PAGE
CRAWL = 64 * 1024  # bytes per second: postcopy does not end by itself
FAST = 0
PAUSED = "postcopy-paused"
# Main memory that the CPU leaves alone, and that is all zero.
EMPTY = 24 * MIB

MODES = {
    "plain": ("postcopy-ram",),
    "preempt": ("postcopy-ram", "postcopy-preempt"),
}
both_modes = pytest.mark.parametrize("mode", MODES)
EVERYWHERE = [(version, mode) for version in ("10", "7.2") for mode in MODES]


def park(version: str, folder: Path, *, stopped: bool = False) -> Path:
    """A VM in a directory of its own."""
    parked = folder / "parked"
    with (
        Machine(memory=MEMORY, version=version, counting=True) as qemu,
        Destination(folder, "--park", str(parked)) as dstd,
    ):
        qemu.ram[0].fill(1, counting_guest.LAST)
        qemu.ram[0].bytes[EMPTY:] = bytes(MEMORY - EMPTY)
        qemu.wait_for_counting()
        if stopped:
            qemu.execute("stop")
        dstd.set_capabilities()
        qemu.set_capabilities("return-path")
        qemu.set_parameters(max_bandwidth=FAST)
        qemu.migrate(dstd.listen())
        qemu.wait_status("completed")
        assert dstd.wait_status("completed", "failed") == "completed", dstd.said
    return parked


class Originals(dict[str, Path]):
    """A parked VM of each version of QEMU, made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, version: str) -> Path:
        folder = self._folder / version
        folder.mkdir()
        self[version] = park(version, folder)
        return self[version]


@dataclass
class Place:
    """A parked VM of a test's own."""

    folder: Path
    parked: Path
    version: str = "10"

    @contextlib.contextmanager
    def server(
        self, *options: str, name: str = "srcd", wrapper: Sequence[str] = ()
    ) -> Iterator[Source]:
        words = ("--parked", str(self.parked), *options)
        with Source(self.folder, *words, name=name, wrapper=wrapper) as srcd:
            if srcd.query().get("status") != PAUSED:
                srcd.set_capabilities()
            srcd.set_parameters(max_bandwidth=FAST)
            yield srcd

    def machine(self, *arguments: str, **more: Any) -> Machine:
        """A QEMU that waits for it."""
        return Machine(
            memory=MEMORY,
            version=self.version,
            counting=True,
            incoming=True,
            arguments=arguments,
            **more,
        )

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.parked / "manifest.json").read_text())
        return found

    @property
    def regions(self) -> int:
        return sum(-(-block["length"] // 65536) for block in self.manifest["blocks"])

    @property
    def pages(self) -> int:
        return sum(block["length"] for block in self.manifest["blocks"]) // PAGE

    def file_of(self, block: str) -> Path:
        (found,) = (b for b in self.manifest["blocks"] if b["name"] == block)
        return self.parked / str(found["file"])

    @property
    def marked(self) -> bool:
        return (self.parked / "running").exists()

    def digests(self) -> dict[str, str]:
        """Of all files but those that serving may make."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.parked.iterdir()
            if path.name not in ("running", "working-set")
        }


def copied(originals: dict[str, Path], version: str, folder: Path) -> Place:
    shutil.copytree(originals[version], folder / "parked")
    return Place(folder, folder / "parked", version)


def park_running(qemu: Machine, folder: Path, *capabilities: str) -> Place:
    """Put this VM into a directory, in postcopy if that is among them."""
    place = Place(folder, folder / "parked", qemu.version)
    with Destination(folder, "--park", str(place.parked)) as dstd:
        dstd.set_capabilities()
        qemu.set_capabilities("return-path", *capabilities)
        qemu.set_parameters(max_bandwidth=8 * MIB if capabilities else FAST)
        qemu.migrate(dstd.listen())
        if capabilities:
            qemu.wait_status("active")
            qemu.start_postcopy()
        qemu.wait_status("completed")
        assert dstd.wait_status("completed", "failed") == "completed", dstd.said
    return place


def assert_unharmed(place: Place, qemu: Machine) -> None:
    """All is there; the guest runs, and all that it does not write is as it was."""
    before = counting_guest.counters(qemu.ram[0].bytes)
    assert any(before), "the counters were lost"
    qemu.wait_for_counting()
    qemu.execute("stop")
    counting_guest.assert_consistent(qemu.ram[0].bytes)
    (block,) = (b for b in place.manifest["blocks"] if b["name"] == MAIN)
    with (place.parked / block["file"]).open("rb") as file:
        file.seek(block["offset"] + counting_guest.LAST)
        rest = block["length"] - counting_guest.LAST
        assert qemu.ram[0].bytes[counting_guest.LAST :] == file.read(rest)


def complete(srcd: Source, qemu: Machine) -> None:
    end = srcd.wait_status("completed", "failed", PAUSED)
    assert end == "completed", (srcd.query(), srcd.said, qemu.stderr)
    qemu.wait_status("completed")


def start_slowly(srcd: Source, qemu: Machine, mode: str) -> None:
    """Until the guest runs, and most of its memory is still to come."""
    qemu.set_capabilities(*MODES[mode])
    srcd.set_parameters(max_postcopy_bandwidth=CRAWL)
    srcd.migrate(qemu.listen())
    srcd.wait_status("postcopy-active")
    qemu.wait_event("RESUME")


def wait_for_requests(srcd: Source, count: int) -> None:
    while srcd.ours["requested-pages"] < count:
        assert srcd.query()["status"] == "postcopy-active", srcd.query()


def assert_on_preempt(counted: dict[str, Any], *, preempt: bool) -> None:
    """What was asked for went there, but for the first, when it was not known."""
    there, asked = (
        counted[name] for name in ("urgent-pages-on-preempt", "urgent-pages")
    )
    assert there <= asked if preempt else there == 0
