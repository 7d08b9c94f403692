"""A parked VM runs once, whatever happens when it is served; clones do not count."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from support.machine import Machine
from support.mute import MuteDestination
from support.parked_machine import (
    FAST,
    MEMORY,
    PAUSED,
    assert_unharmed,
    complete,
    park_running,
    start_slowly,
)

from common.qmp.client import CommandFailed

if TYPE_CHECKING:
    from support.parked_machine import Place

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]


def test_it_runs_once(place: Place) -> None:
    with place.server() as srcd, place.machine() as qemu:
        assert not place.marked
        with pytest.raises(RuntimeError, match="--clone"), place.server(name="second"):
            pass
        start_slowly(srcd, qemu, "plain")
        assert place.marked
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        with pytest.raises(CommandFailed):
            srcd.migrate("tcp:127.0.0.1:1")
    with pytest.raises(RuntimeError, match=r"runs elsewhere.*--clone"), place.server():
        pass


def test_marked_before_it_may_run(place: Place) -> None:
    """A srcd that dies before it knows whether the VM runs has not lost that it may."""
    with MuteDestination() as mute, place.server() as srcd:
        srcd.migrate(mute.uri)
        mute.wait_package()
        assert srcd.query()["status"] == "device"
        assert place.marked
        srcd.process.kill()
        srcd.process.wait()
    with place.server(name="next") as srcd:
        assert srcd.query()["status"] == PAUSED
        with pytest.raises(CommandFailed):
            srcd.migrate("tcp:127.0.0.1:1")


def test_mark_is_removed_when_it_does_not_run(place: Place) -> None:
    with MuteDestination() as mute, place.server() as srcd:
        srcd.migrate(mute.uri)
        mute.wait_package()
        assert place.marked
        mute.close_main()
        assert srcd.wait_status("failed", PAUSED) == "failed"
        assert not place.marked


def test_not_served_where_no_mark_can_be_made(place: Place) -> None:
    (place.parked / "running.new").mkdir()
    with place.server() as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        assert srcd.wait_status("failed", PAUSED, "completed") == "failed"
        assert "running.new" in srcd.query()["error-desc"]
    assert not place.marked


def test_clones_at_once_and_again(place: Place) -> None:
    with (
        place.server("--clone", name="one") as one,
        place.server("--clone", name="two") as two,
        place.machine() as first,
        place.machine() as second,
        place.machine() as third,
    ):
        for srcd, qemu in ((one, first), (two, second)):
            start_slowly(srcd, qemu, "plain")
        for srcd, qemu in ((one, first), (two, second)):
            srcd.set_parameters(max_postcopy_bandwidth=FAST)
            complete(srcd, qemu)
            assert_unharmed(place, qemu)
        third.set_capabilities("postcopy-ram")
        one.migrate(third.listen())
        complete(one, third)
        assert_unharmed(place, third)
    assert not place.marked


@pytest.mark.parametrize(
    "other", [{"kind": "q35"}, {"arguments": ("-device", "pci-bridge,chassis_nr=1")}]
)
@pytest.mark.parametrize("restore", ["lazy", "precopy"])
def test_other_machine_leaves_no_mark(
    place: Place, restore: str, other: dict[str, Any]
) -> None:
    """QEMU refuses it: the one of another kind, or the one with a device less."""
    if "kind" not in other:
        shutil.rmtree(place.parked)
        with Machine(memory=MEMORY, counting=True, **other) as qemu:
            qemu.wait_for_counting()
            park_running(qemu, place.folder)
    with place.server("--restore", restore) as srcd:
        wrong = place.machine(**{k: v for k, v in other.items() if k == "kind"})
        with wrong as qemu:
            if restore == "lazy":
                qemu.set_capabilities("postcopy-ram")
            srcd.migrate(qemu.listen())
            end = srcd.wait_status("completed", "failed", PAUSED)
            assert end == "failed", srcd.said
        assert not place.marked, srcd.said
        assert not srcd.execute("query-status")["running"]
        with place.machine(*other.get("arguments", ())) as qemu:
            if restore == "lazy":
                qemu.set_capabilities("postcopy-ram")
            srcd.migrate(qemu.listen())
            complete(srcd, qemu)
    assert place.marked


def test_destination_without_postcopy(place: Place) -> None:
    with place.server() as srcd, place.machine() as qemu:
        srcd.migrate(qemu.listen())
        assert srcd.wait_status("completed", "failed", PAUSED) == "failed"
    assert not place.marked
