"""How the daemons end, and what becomes of the guest then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.daemons import PREEMPT, Destination, Source, assert_unharmed, prepare

MIB = 1 << 20
NOT_OURS = "tcp:203.0.113.1:4444"  # RFC 5737: nobody's address


def test_a_daemon_that_cannot_begin_leaves_no_guest(private_dir: Path) -> None:
    """The fixture that looks for processes left behind is the check."""
    words = [
        str(Path(sys.executable).with_name("dstd")),
        *("serve", "--qmp", str(private_dir / "qmp"), "--memory", "64M"),
        *("--serial", f"file:{private_dir}/serial", "--incoming", NOT_OURS),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Failed to bind socket" in done.stderr


@pytest.mark.userfaultfd
def test_quit_during_precopy_ends_both_in_order(private_dir: Path) -> None:
    with (
        Source(private_dir, "--memory", "64M") as src,
        Destination(private_dir, "--memory", "64M") as dst,
    ):
        src.wait_filled()
        prepare(src, dst, *PREEMPT)
        src.set_parameters(max_bandwidth=4 * MIB)
        src.migrate(dst.listen())
        src.wait_status("active")
        src.execute("quit")
        assert src.process.wait(30) == 0
        assert dst.wait_status("failed") == "failed"


@pytest.mark.userfaultfd
def test_failed_and_cancelled_migrations_leave_nothing_behind(
    private_dir: Path,
) -> None:
    """Descriptors and memory of a source that tried often, and then succeeds."""
    with Source(private_dir, "--memory", "64M") as src:
        before = src.wait_filled()
        src.set_capabilities(*PREEMPT)
        src.set_parameters(max_bandwidth=4 * MIB)
        try_and_fail(src, private_dir, rounds=3)
        descriptors, memory = open_descriptors(src), src.own_memory()
        try_and_fail(src, private_dir, rounds=20)
        assert open_descriptors(src) <= descriptors
        assert src.own_memory() < memory + 4 * MIB
        src.set_parameters(max_bandwidth=0)
        with Destination(private_dir, "--memory", "64M") as dst:
            dst.set_capabilities(*PREEMPT)
            src.migrate(dst.listen())
            src.execute("migrate-start-postcopy")
            assert src.wait_status("completed", "failed") == "completed", src.query()
            dst.wait_status("completed")
            assert_unharmed(dst, before)


def try_and_fail(src: Source, directory: Path, rounds: int) -> None:
    """To nobody, which fails; and to somebody, which is cancelled."""
    for number in range(rounds):
        src.migrate(f"unix:{directory}/nobody")
        assert src.wait_status("failed") == "failed"
        if number % 10 == 0:
            with Destination(directory, "--memory", "64M") as dst:
                dst.set_capabilities(*PREEMPT)
                src.migrate(dst.listen())
                src.wait_status("active")
                src.execute("migrate_cancel")
                assert src.wait_status("cancelled") == "cancelled"


def open_descriptors(src: Source) -> int:
    return len(list(Path(f"/proc/{src.process.pid}/fd").iterdir()))


def test_a_refused_source_costs_the_destination_nothing(private_dir: Path) -> None:
    """The RAM file that is there stays as it is until a source is accepted."""
    theirs, ours = private_dir / "theirs", private_dir / "ours"
    theirs.write_bytes(b"new!" * 1024)
    ours.write_bytes(b"old." * 1024)
    with (
        Source(private_dir, "--ram", f"other={theirs}") as src,
        Destination(private_dir, "--ram", f"ram={ours}") as dst,
    ):
        prepare(src, dst)
        src.migrate(dst.listen())
        assert src.wait_status("failed", "completed") == "failed"
        assert "'other'" in src.query()["error-desc"]
        assert dst.wait_status("failed") == "failed"
    assert ours.read_bytes() == b"old." * 1024
