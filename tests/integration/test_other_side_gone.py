"""The other side is killed before the switchover, or was never there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import processes
from support.accels import both_accels
from support.daemons import Destination, Source
from support.ram import MIB
from support.refusals import (
    SMALL,
    assert_moves,
    assert_runs_on,
    attempt,
    free_port,
    precopy_and_postcopy,
    source,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.userfaultfd


def kill(daemon: Source | Destination) -> None:
    """kill -9. Its built-in guest outlives it, which is not what is tested."""
    daemon.process.kill()
    daemon.process.wait()


def end_guests_left() -> None:
    for pid, name in processes.children().items():
        if name == "microvm":
            processes.end(pid)


@both_accels
@precopy_and_postcopy
def test_destination_killed_in_precopy(
    private_dir: Path, accel: str, capabilities: tuple[str, ...]
) -> None:
    with source(private_dir, accel=accel) as src:
        src.set_capabilities(*capabilities)
        src.set_parameters(max_bandwidth=MIB)
        with Destination(private_dir, *SMALL, "--accel", accel) as dst:
            dst.set_capabilities(*capabilities)
            before = src.report()
            src.migrate(dst.listen())
            src.wait_status("active")
            kill(dst)
            assert src.wait_status("failed", "completed") == "failed"
            end_guests_left()
        assert "device" not in src.statuses
        assert "channel" in src.query()["error-desc"]
        assert_runs_on(src, before)
        src.set_parameters(max_bandwidth=0)
        assert_moves(src, private_dir, accel=accel)


@precopy_and_postcopy
def test_source_killed_in_precopy(
    private_dir: Path, capabilities: tuple[str, ...]
) -> None:
    with (
        Destination(private_dir, *SMALL, "--accel", "process") as dst,
        source(private_dir) as src,
    ):
        src.set_capabilities(*capabilities)
        dst.set_capabilities(*capabilities)
        src.set_parameters(max_bandwidth=MIB)
        src.migrate(dst.listen())
        src.wait_status("active")
        dst.wait_status("active")
        kill(src)
        assert dst.wait_status("failed", "completed") == "failed"
        end_guests_left()
        said = dst.query()["error-desc"]
        # A reset, if it had not read all that was said to it.
        assert "closed" in said or "reset" in said
        assert dst.execute("query-status") == {"status": "inmigrate", "running": False}


def test_nobody_listens(private_dir: Path) -> None:
    with source(private_dir) as src:
        port = free_port()
        error = attempt(src, f"tcp:127.0.0.1:{port}")
        assert f"Failed to connect to '127.0.0.1:{port}': Connection refused" in error
        error = attempt(src, f"unix:{private_dir}/nobody")
        assert "No such file or directory" in error
        assert_moves(src, private_dir, accel="process")
