"""The Linux guest itself, from QEMU to QEMU: what the tests look at is alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.linux_guest import Console, LinuxGuest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.linux]


@pytest.mark.parametrize(("version", "machine"), [("10", "q35"), ("7.2", "pc")])
def test_guest_is_moved_by_qemu(private_dir: Path, version: str, machine: str) -> None:
    disk = private_dir / "disk"
    with LinuxGuest(
        private_dir, "source", version=version, machine=machine, disk=disk
    ) as source:
        before = source.wait_busy()
        with LinuxGuest(
            private_dir,
            "destination",
            version=version,
            machine=machine,
            disk=disk,
            incoming=True,
            earlier=source,
        ) as destination:
            source.set_parameters(max_bandwidth=0)
            source.migrate(destination.listen())
            destination.wait_status("completed")
            destination.wait_continued(before)


def test_console_of_a_guest_that_had_to_wait_is_good() -> None:
    Console.parse(b"c 1\nk hrtimer: interrupt took 46099923 ns\nc 2\n").assert_good()


def test_console_joins_lines_that_a_move_has_cut() -> None:
    said = Console.parse(b"c 1\r\nh 1 ok\r\nc " + b"2\r\nc 3\r\nc 4")
    assert said.counts == (1, 2, 3)
    assert said.cycles == (1,)
    said.assert_good()


@pytest.mark.parametrize(
    "text",
    [
        b"c 1\nc 3\n",
        b"c 2\nc 2\n",
        b"h 1 ok\nh 2 wrong 1 first 7\n",
        b"d 4 wrong\n",
        b"k BUG: unable to handle page fault\n",
    ],
)
def test_console_of_a_harmed_guest_is_seen(text: bytes) -> None:
    with pytest.raises(AssertionError):
        Console.parse(text).assert_good()
