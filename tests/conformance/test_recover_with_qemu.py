"""`srcd recover`, the scripts and automatic recovery with a QEMU at the other end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from conformance.test_interop import FAST, LAYOUTS, MODES, Ends, both_complete
from conformance.test_recovery_interop import PAUSED, into_postcopy, remaining
from support.daemons import Destination, Source
from support.parked import fill, ram_arguments, shared_ram
from support.ports import free_address
from support.qemu import Qemu
from support.ram import MIB
from support.recover import SCRIPTS, recover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.recover import Run

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]

WAYS = {"srcd recover": lambda qmp, peer, uri: recover(qmp, peer, "--uri", uri)}
WAYS |= SCRIPTS

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
versions = pytest.mark.parametrize("version", ["10", "7.2"])


def own_monitor(path: Path) -> tuple[str, str]:
    """Beside that of the test, which a QEMU does not share."""
    return ("-qmp", f"unix:{path},server=on,wait=off")


@contextlib.contextmanager
def from_qemu(directory: Path, version: str) -> Iterator[Ends]:
    monitor = own_monitor(directory / "qemu.qmp")
    with (
        Qemu(*LAYOUTS["one"], version=version, arguments=monitor) as qemu,
        shared_ram(qemu) as ram,
        Destination(directory, *ram_arguments(qemu, ram)) as dstd,
    ):
        qemu.fill(seed=1)
        qemu.set_parameters(max_bandwidth=FAST)
        for side in (qemu, dstd):
            side.set_capabilities(*MODES["postcopy"])
        into_postcopy(qemu, dstd, "postcopy")
        yield Ends(qemu, dstd, ram)


@contextlib.contextmanager
def to_qemu(directory: Path, version: str) -> Iterator[Ends]:
    monitor = own_monitor(directory / "qemu.qmp")
    with (
        Qemu(
            *LAYOUTS["one"], version=version, incoming=True, arguments=monitor
        ) as qemu,
        shared_ram(qemu) as ram,
        Source(directory, *ram_arguments(qemu, ram)) as srcd,
    ):
        fill(ram, seed=1)
        srcd.set_parameters(max_bandwidth=FAST)
        for side in (qemu, srcd):
            side.set_capabilities(*MODES["postcopy"])
        into_postcopy(srcd, qemu, "postcopy")
        yield Ends(qemu, srcd, ram)


def both_paused(ends: Ends, source: Any) -> None:
    source.execute("migrate-pause")
    for side in (ends.qemu, ends.daemon):
        side.wait_status(PAUSED)
    assert remaining(source) > MIB


def completes(ends: Ends, source: Any) -> None:
    for side in (ends.qemu, ends.daemon):
        side.wait_status("postcopy-recover")
        side.wait_status("postcopy-active")
    source.set_parameters(max_postcopy_bandwidth=FAST)
    both_complete(ends)


@versions
@ways
def test_a_qemu_source(
    private_dir: Path, version: str, way: Callable[..., Run]
) -> None:
    with from_qemu(private_dir, version) as ends:
        both_paused(ends, ends.qemu)
        done = way(private_dir / "qemu.qmp", ends.daemon.qmp_path, free_address())
        assert done.returncode == 0, done
        completes(ends, ends.qemu)
        assert ends.daemon.ours["duplicate-pages"] == 0


@versions
@ways
def test_a_qemu_destination(
    private_dir: Path, version: str, way: Callable[..., Run]
) -> None:
    with to_qemu(private_dir, version) as ends:
        both_paused(ends, ends.daemon)
        done = way(ends.daemon.qmp_path, private_dir / "qemu.qmp", free_address())
        assert done.returncode == 0, done
        completes(ends, ends.daemon)


@versions
def test_where_it_listened(private_dir: Path, version: str) -> None:
    """No address is given, at either kind of destination."""
    with from_qemu(private_dir, version) as ends:
        both_paused(ends, ends.qemu)
        done = recover(private_dir / "qemu.qmp", ends.daemon.qmp_path)
        assert done.returncode == 0, done
        completes(ends, ends.qemu)
    with to_qemu(private_dir, version) as ends:
        both_paused(ends, ends.daemon)
        done = recover(ends.daemon.qmp_path, private_dir / "qemu.qmp")
        assert done.returncode == 0, done
        completes(ends, ends.daemon)


@versions
def test_srcd_comes_back_to_qemu_by_itself(private_dir: Path, version: str) -> None:
    """QEMU still listens, and takes the connection that resumes."""
    with to_qemu(private_dir, version) as ends:
        ends.daemon.set_parameters(x_postcopyd_recovery_auto=True)
        ends.qemu.execute("migrate-pause")
        for side in (ends.qemu, ends.daemon):
            side.wait_status(PAUSED)
        event = ends.daemon.qmp.wait_event(
            "X_POSTCOPYD_RECOVERY", 30, result="recovered"
        )
        assert event["data"]["attempt"] >= 1
        completes(ends, ends.daemon)
        assert ends.daemon.ours["recovery"]["recovered"] == 1
