"""A destination that cannot take the guest refuses before the source stops it.

Every test looks at both sides: the source's guest was never stopped, still runs
and finds no wrong page; both sides say what is the matter and what to do about
it; and the next migration, to a destination that fits, succeeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.accels import both_accels
from support.daemons import (
    POSTCOPY,
    PREEMPT,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    move_precopy,
)
from support.ram import MIB
from support.refusals import (
    PATIENCE,
    SMALL,
    assert_moves,
    assert_refused,
    assert_runs_on,
    attempt,
    capabilities,
    free_port,
    precopy_and_postcopy,
    source,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.userfaultfd


# --- what does not fit ------------------------------------------------------------


@both_accels
@precopy_and_postcopy
def test_refused_less_memory(
    private_dir: Path, accel: str, capabilities: tuple[str, ...]
) -> None:
    with source(private_dir, accel=accel) as src:
        words = ("--memory", "24M", "--accel", accel)
        with Destination(private_dir, *words) as dst:
            src.set_capabilities(*capabilities)
            dst.set_capabilities(*capabilities)
            texts = (str(32 * MIB), str(24 * MIB), "same --memory")
            assert_refused(src, dst, "'ram'", *texts)
        assert_moves(src, private_dir, accel=accel)


@both_accels
@precopy_and_postcopy
def test_refused_other_machine(
    private_dir: Path, accel: str, capabilities: tuple[str, ...]
) -> None:
    with source(private_dir, accel=accel) as src:
        words = (*SMALL, "--accel", accel, "--machine", "other-1")
        with Destination(private_dir, *words) as dst:
            src.set_capabilities(*capabilities)
            dst.set_capabilities(*capabilities)
            assert_refused(src, dst, "'postcopyd-1'", "'other-1'", "same --machine")
        assert_moves(src, private_dir, accel=accel)


def test_refused_when_listening_from_the_start(private_dir: Path) -> None:
    """With exit-on-error, the default, the process says why and ends."""
    with source(private_dir) as src:
        port = free_port()
        words = (*SMALL, "--accel", "process", "--machine", "other-1")
        words = (*words, "--incoming", f"tcp:127.0.0.1:{port}")
        with Destination(private_dir, *words) as dst:
            theirs = attempt(src, f"tcp:127.0.0.1:{port}")
            assert "same --machine" in theirs
            assert dst.process.wait(PATIENCE) == 1
            assert "same --machine" in dst.said
            assert "Traceback" not in dst.said
        assert_moves(src, private_dir, accel="process")


@pytest.mark.parametrize("exit_on_error", [False, True])
def test_refused_exit_on_error(private_dir: Path, exit_on_error: bool) -> None:
    with source(private_dir) as src:
        words = ("--memory", "24M", "--accel", "process")
        with Destination(private_dir, *words) as dst:
            path = f"unix:{private_dir}/incoming"
            dst.execute("migrate-incoming", uri=path, exit_on_error=exit_on_error)
            assert "same --memory" in attempt(src, path)
            if exit_on_error:
                assert dst.process.wait(PATIENCE) == 1
                assert "same --memory" in dst.said
                assert "Traceback" not in dst.said
            else:
                assert "same --memory" in dst.query()["error-desc"]
        assert_moves(src, private_dir, accel="process")


# --- page size ----------------------------------------------------------------------


@pytest.mark.hugepages
@pytest.mark.kvm
@pytest.mark.parametrize("huge", ["source", "destination"])
def test_refused_other_page_size(
    private_dir: Path, reserve_hugepages: Callable[[int], None], huge: str
) -> None:
    reserve_hugepages(32)
    with_huge = (*SMALL, "--hugepages", "2M")
    ours, theirs = (with_huge, SMALL) if huge == "source" else (SMALL, with_huge)
    with source(private_dir, *ours, accel="kvm") as src:
        with Destination(private_dir, *theirs, "--accel", "kvm") as dst:
            src.set_capabilities(*POSTCOPY)
            dst.set_capabilities(*POSTCOPY)
            assert_refused(src, dst, "0x1000", "0x200000", "same --hugepages")
        assert_moves(src, private_dir, *ours, accel="kvm")


@pytest.mark.hugepages
@pytest.mark.kvm
def test_other_page_size_is_fine_in_precopy(
    private_dir: Path, reserve_hugepages: Callable[[int], None]
) -> None:
    reserve_hugepages(16)
    with source(private_dir, *SMALL, "--hugepages", "2M", accel="kvm") as src:
        assert_moves(src, private_dir, accel="kvm")


# --- guests without CPUs --------------------------------------------------------------


def assert_parked_refused(
    directory: Path, ours: tuple[str, ...], theirs: tuple[str, ...], *texts: str
) -> None:
    with (
        Source(directory, *rams(directory, "s", *ours)) as src,
        Destination(directory, *rams(directory, "d", *theirs)) as dst,
    ):
        src.set_capabilities()
        dst.set_capabilities()
        src.migrate(dst.listen())
        assert src.wait_status("failed", "completed") == "failed"
        assert dst.wait_status("failed", "completed") == "failed"
        assert "device" not in src.statuses
        assert src.execute("query-status")["running"]
        for text in texts:
            assert text in src.query()["error-desc"]
            assert text in dst.query()["error-desc"]


def rams(directory: Path, side: str, *blocks: str) -> list[str]:
    """`NAME,size=SIZE` as options, each with a file of its own."""
    words = []
    for number, block in enumerate(blocks):
        name, comma, size = block.partition(",")
        words += ["--ram", f"{name}={directory}/{side}{number}{comma}{size}"]
    return words


@pytest.mark.parametrize(
    ("ours", "theirs", "texts"),
    [
        pytest.param(
            ("a,size=1M",), ("b,size=1M",), ("'a'", "'b'", "name them alike"), id="name"
        ),
        pytest.param(
            ("a,size=1M",),
            ("a,size=1M", "b,size=1M"),
            ("our RAM block 'b'", "name them alike"),
            id="surplus",
        ),
        pytest.param(
            ("a,size=1M", "b,size=1M"),
            ("a,size=1M",),
            ("a RAM block 'b'", "name them alike"),
            id="lacking",
        ),
        pytest.param(
            ("a,size=2M", "b,size=1M"),
            ("a,size=1M", "b,size=2M"),
            ("'a'", "2097152", "1048576"),
            id="size",
        ),
        pytest.param(
            ("a,size=1T",), ("a,size=1T",), ("1048576 MiB", "--overcommit"), id="host"
        ),
    ],
)
def test_refused_blocks(
    private_dir: Path,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    texts: tuple[str, ...],
) -> None:
    assert_parked_refused(private_dir, ours, theirs, *texts)


# --- capabilities ---------------------------------------------------------------------


@both_accels
def test_refused_postcopy_at_source_only(private_dir: Path, accel: str) -> None:
    with source(private_dir, accel=accel) as src:
        with Destination(private_dir, *SMALL, "--accel", accel) as dst:
            src.set_capabilities(*POSTCOPY)
            dst.set_capabilities()
            assert_refused(src, dst, "postcopy-ram", "on both sides or on neither")
        assert_moves(src, private_dir, accel=accel)


def test_postcopy_at_destination_only_is_precopy(private_dir: Path) -> None:
    with (
        source(private_dir) as src,
        Destination(private_dir, *SMALL, "--accel", "process") as dst,
    ):
        src.set_capabilities()
        dst.set_capabilities(*POSTCOPY)
        before = src.report()
        move_precopy(src, dst)
        assert_unharmed(dst, before)


@both_accels
@pytest.mark.parametrize("side", ["source", "destination"])
def test_refused_preempt_at_one_side_only(
    private_dir: Path, accel: str, side: str
) -> None:
    ours, theirs = (PREEMPT, POSTCOPY) if side == "source" else (POSTCOPY, PREEMPT)
    with source(private_dir, accel=accel) as src:
        with Destination(private_dir, *SMALL, "--accel", accel) as dst:
            src.set_capabilities(*ours)
            dst.set_capabilities(*theirs)
            assert_refused(src, dst, "postcopy-preempt", "on both sides or on neither")
        assert_moves_with(src, private_dir, ours, accel=accel)


def assert_moves_with(
    src: Source, directory: Path, capabilities: tuple[str, ...], *, accel: str
) -> None:
    with Destination(directory, *SMALL, "--accel", accel, name="fits") as dst:
        dst.set_capabilities(*capabilities)
        before = src.report()
        move_postcopy(src, dst)
        assert_unharmed(dst, before)


# --- refused late: the guest had been stopped, and goes on ----------------------------


def assert_given_back(src: Source, dst: Destination, *texts: str) -> None:
    """The destination could not load the device state; both sides say why."""
    before = src.report()
    src.migrate(dst.listen())
    if "postcopy-ram" in [c["capability"] for c in capabilities(src) if c["state"]]:
        src.execute("migrate-start-postcopy")
    assert src.wait_status("failed", "completed") == "failed"
    assert dst.wait_status("failed", "completed") == "failed"
    assert "device" in src.statuses
    names = [event["event"] for event in src.qmp.events()]
    assert names.count("STOP") == names.count("RESUME") == 1
    for text in texts:
        assert text in dst.query()["error-desc"]
        assert text in src.query()["error-desc"]
    assert_runs_on(src, before)


@precopy_and_postcopy
@pytest.mark.parametrize(
    ("words", "texts"),
    [
        pytest.param(
            ("--accel", "process", "--vcpus", "2"),
            ("1 vCPUs, this guest has 2",),
            id="vcpus",
        ),
        pytest.param(
            ("--accel", "kvm"),
            ("start both sides with the same kind of guest",),
            id="kind",
            marks=pytest.mark.kvm,
        ),
    ],
)
def test_given_back_other_device(
    private_dir: Path,
    capabilities: tuple[str, ...],
    words: tuple[str, ...],
    texts: tuple[str, ...],
) -> None:
    with source(private_dir) as src:
        src.set_capabilities(*capabilities)
        with Destination(private_dir, *SMALL, *words) as dst:
            dst.set_capabilities(*capabilities)
            assert_given_back(src, dst, *texts)
        assert_moves(src, private_dir, accel="process")
