"""What a VM asked for when it ran from its directory comes unasked the next time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support import counting_guest
from support.parked_machine import (
    COUNTED,
    FAST,
    MODES,
    assert_unharmed,
    both_modes,
    complete,
    start_slowly,
    wait_for_requests,
)

from common.store.parked import Parked

if TYPE_CHECKING:
    from support.daemons import Source
    from support.machine import Machine
    from support.parked_machine import Place

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]


def wait_for_counted(srcd: Source, qemu: Machine) -> None:
    """Until all pages that the CPU counts in are there.

    It need not have asked for each: some may come before it gets to them.
    """
    # Not through a mapping: that would fill what QEMU waits for.
    while not all(
        counting_guest.counters(os.pread(qemu.ram[0].fd, counting_guest.LAST, 0))
    ):
        assert srcd.query()["status"] == "postcopy-active", srcd.query()


@both_modes
def test_working_set(place: Place, mode: str) -> None:
    """What was asked for once is there before it is asked for."""
    with place.server("--clone") as srcd, place.machine() as qemu:
        start_slowly(srcd, qemu, mode)
        wait_for_counted(srcd, qemu)
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        asked = srcd.ours["urgent-pages"]
    all_come_unasked(place, mode, asked)


def test_learning(place: Place) -> None:
    """Nothing comes unasked for a while, so all that is asked for is known."""
    with place.server("--clone", "--learn", "5") as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        srcd.wait_status("postcopy-active")
        wait_for_requests(srcd, COUNTED)
        assert srcd.ours["background-pages"] == 0
        complete(srcd, qemu)
        asked = srcd.ours["urgent-pages"]
    with Parked.open(place.parked) as parked:
        assert len(parked.working_set) == asked
    all_come_unasked(place, "plain", asked)


def all_come_unasked(place: Place, mode: str, asked: int) -> None:
    """To a machine whose CPU stands still and asks for nothing meanwhile."""
    with place.server("--clone") as srcd, place.machine("-S") as qemu:
        qemu.set_capabilities(*MODES[mode])
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        # Its devices may have asked for some.
        early = srcd.ours["urgent-pages"]
        assert asked - early <= srcd.ours["working-set-pages"] <= asked
        assert early < asked
        qemu.execute("cont")
        assert_unharmed(place, qemu)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--learn", "-1"), "--learn must be 0 to 3600 seconds"),
        (("--learn", "3601"), "--learn must be 0 to 3600 seconds"),
        (("--learn", "1", "--restore", "precopy"), "--learn goes with --parked"),
        (("--learn", "1", "--no-working-set"), "leave one out"),
    ],
)
def test_learning_refused(
    place: Place, options: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=sentence), place.server(*options):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff" * 12, bytes(1 << 12)])
def test_malformed_working_set(place: Place, content: bytes) -> None:
    (place.parked / "working-set").write_bytes(content)
    with place.server() as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        assert "working-set" in srcd.said
        assert srcd.ours["working-set-pages"] == 0
        assert_unharmed(place, qemu)


def test_no_working_set(place: Place) -> None:
    with place.server("--no-working-set") as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
    assert not (place.parked / "working-set").exists()
