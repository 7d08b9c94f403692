"""dstd --park is started again: what it finds is neither lost nor believed too much.

That a killed one goes on is in tests/park/test_crashes.py. Here is what can become
of its directory in between.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from support.daemons import STATUS_SECONDS, Destination, Source, prepare

from common.store import receiving
from common.store.directory import Parked
from common.stream import constants, returnpath

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace to see what is synced"
)

MIB = 1 << 20
PAGE = 4096
RAM = 32 * MIB
SLOW = 2 * MIB  # bytes per second
GUEST = ("--memory", "32M", "--accel", "process")


@dataclass
class Half:
    """A VM of which the source has most, and `directory` the rest."""

    src: Source
    place: Path
    directory: Path

    def again(self) -> Destination:
        return Destination(self.place, "--park", str(self.directory), name="again")

    def finish(self, dst: Destination) -> None:
        """By a recovery to the end; then it is what the source has."""
        self.src.set_parameters(max_postcopy_bandwidth=0)
        self.src.execute("migrate", uri=address_of(dst), resume=True)
        assert self.src.wait_status("completed", "failed") == "completed"
        assert dst.wait_status("completed", "failed") == "completed", dst.query()
        whole = self.place / "whole"
        self.src.execute("pmemsave", val=0, size=RAM, filename=str(whole))
        with Parked.open(self.directory) as parked:
            parked.verify()
            block = self.directory / parked.manifest.blocks[0].file
            assert block.read_bytes() == whole.read_bytes()


def address_of(dst: Destination) -> str:
    (address,) = dst.query()["socket-address"]
    return f"tcp:{address['host']}:{address['port']}"


def wait_pages(dst: Destination, number: int) -> None:
    deadline = time.monotonic() + STATUS_SECONDS
    while dst.ours["postcopy-pages"] < number:
        assert time.monotonic() < deadline, dst.query()


@contextmanager
def half(place: Path) -> Iterator[Half]:
    """Parked by postcopy until dstd was killed."""
    directory = place / "vm"
    with Source(place, *GUEST) as src:
        src.wait_filled()
        with Destination(place, "--park", str(directory)) as dst:
            prepare(src, dst)
            src.set_capabilities("postcopy-ram")
            src.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
            src.migrate(dst.listen())
            src.wait_status("active")
            src.execute("migrate-start-postcopy")
            src.wait_status("postcopy-active")
            wait_pages(dst, 100)
            dst.end()
        src.wait_status("postcopy-paused")
        yield Half(src, place, directory)


def other_boot(directory: Path) -> None:
    """As if the host had been restarted since."""
    path = directory / receiving.NAME
    first, *others = path.read_text().splitlines(keepends=True)
    assert json.loads(first) == {"boot": receiving.this_boot().boot}
    path.write_text("".join([json.dumps({"boot": "before"}) + "\n", *others]))


def test_files_have_other_numbers(private_dir: Path) -> None:
    """A copy of the directory, or a device that the kernel numbers anew."""
    with half(private_dir) as vm:
        moved = private_dir / "moved"
        shutil.copytree(vm.directory, moved, ignore=shutil.ignore_patterns("upstream"))
        shutil.rmtree(vm.directory)
        vm.directory = moved
        with vm.again() as dst:
            assert dst.query()["status"] == "postcopy-paused", dst.said
            vm.finish(dst)


def test_host_was_restarted(private_dir: Path) -> None:
    """Whatever of it was written to the disk before: all pages come again."""
    with half(private_dir) as vm:
        other_boot(vm.directory)
        ram = vm.directory / "ram-0000"
        with ram.open("r+b") as file:
            file.truncate(RAM // 2)
            file.write(os.urandom(PAGE) * 64)
        with vm.again() as dst:
            assert dst.query()["status"] == "postcopy-paused", dst.said
            assert "all pages have to come again" in dst.said
            vm.finish(dst)
            came = dst.ours["postcopy-pages"] + dst.ours["precopy-pages"]
            assert came == RAM // PAGE


def test_not_served_before_its_pages_come_again(private_dir: Path) -> None:
    """The marks of what is here are those of the time before."""
    with half(private_dir) as vm:
        assert (vm.directory / "upstream").exists()
        other_boot(vm.directory)
        with (
            pytest.raises(RuntimeError, match="start dstd with it first"),
            Source(private_dir, "--parked", str(vm.directory), name="server"),
        ):
            pass


def test_damaged_record(private_dir: Path) -> None:
    """It does not know whose the VM is: it must not throw anything away."""
    with half(private_dir) as vm:
        kept = vm.directory / "kept-incoming"
        before = set(os.listdir(vm.directory))
        content = kept.read_bytes()
        kept.write_bytes(b"x" * len(content))
        with pytest.raises(RuntimeError, match="is damaged"), vm.again():
            pass
        assert set(os.listdir(vm.directory)) == before
        kept.write_bytes(content)
        with vm.again() as dst:
            vm.finish(dst)


@needs_strace
def test_all_but_pages_is_on_the_disk_before_it_is_ours(private_dir: Path) -> None:
    """The source gives it up when it reads PONG 3."""
    directory, calls = private_dir / "vm", private_dir / "calls"
    traced = ("strace", "-f", "-y", "-x", "-e", "trace=fsync,write,sendto,sendmsg")
    with (
        Source(private_dir, *GUEST) as src,
        Destination(
            private_dir,
            *("--park", str(directory)),
            wrapper=(*traced, "-o", str(calls)),
        ) as dst,
    ):
        src.wait_filled()
        prepare(src, dst)
        src.set_capabilities("postcopy-ram")
        src.set_parameters(max_bandwidth=SLOW)
        src.migrate(dst.listen())
        src.wait_status("active")
        src.execute("migrate-start-postcopy")
        assert src.wait_status("completed", "failed") == "completed"
        assert dst.wait_status("completed", "failed") == "completed", dst.query()
    pong = returnpath.encode(returnpath.Pong(constants.PING_LOADED))
    shown = "".join(f"\\x{byte:02x}" for byte in pong)
    before, found, _ = calls.read_text().partition(shown)
    assert found
    synced = re.findall(rf"fsync\(\d+<{directory}/?([^>]*)>", before)
    assert {"", "configuration", "receiving"} <= set(synced)
    assert {"kept-received", "kept-package"} <= set(synced)
    assert synced.count("kept-incoming") >= 3


def test_killed_while_it_waits(private_dir: Path) -> None:
    """Nothing had come: nothing is in the way of what comes later."""
    directory = private_dir / "vm"
    with Destination(private_dir, "--park", str(directory)) as dst:
        dst.listen()
        dst.end()
        assert os.listdir(directory) == [receiving.NAME]
        dst.start()
        assert dst.query() == {}
        dst.listen()
