"""What a host cannot do is said, before a guest is stopped for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.daemons import (
    POSTCOPY,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    move_precopy,
)
from support.refusals import (
    SMALL,
    assert_moves,
    assert_refused,
    capabilities,
    source,
)

from common.qmp.client import CommandFailed

pytestmark = pytest.mark.userfaultfd

# The device node is a file mode, the system call a capability: take both away.
WITHOUT_USERFAULTFD = (
    *("unshare", "--mount", "sh", "-c"),
    "mount --bind /dev/null /dev/userfaultfd"
    ' && exec setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace "$@"',
    "sh",
)


@pytest.mark.kvm
def test_refused_without_userfaultfd(private_dir: Path) -> None:
    """KVM needs the right; the fix is named when the capability is switched on
    and again if a source tries nevertheless."""
    fix = "set vm.unprivileged_userfaultfd=1"
    words = (*SMALL, "--accel", "kvm")
    with source(private_dir, accel="kvm") as src:
        src.set_capabilities(*POSTCOPY)
        with Destination(private_dir, *words, wrapper=WITHOUT_USERFAULTFD) as dst:
            with pytest.raises(CommandFailed) as refusal:
                dst.set_capabilities(*POSTCOPY)
            assert str(refusal.value).startswith("Postcopy is not supported: ")
            assert fix in str(refusal.value)
            assert not any(c["state"] for c in capabilities(dst))
            dst.set_capabilities()
            assert_refused(src, dst, "postcopy", fix)
        assert_moves(src, private_dir, accel="kvm")


@pytest.mark.kvm
def test_precopy_needs_no_userfaultfd(private_dir: Path) -> None:
    words = (*SMALL, "--accel", "kvm")
    with (
        source(private_dir, accel="kvm") as src,
        Destination(private_dir, *words, wrapper=WITHOUT_USERFAULTFD) as dst,
    ):
        src.set_capabilities()
        dst.set_capabilities()
        before = src.report()
        move_precopy(src, dst)
        assert dst.ours["way"] == "file"
        assert_unharmed(dst, before)


def test_process_guest_needs_no_right_to_userfaultfd(private_dir: Path) -> None:
    """Faults from user mode only are everybody's right, and enough for it."""
    words = (*SMALL, "--accel", "process")
    with (
        source(private_dir) as src,
        Destination(private_dir, *words, wrapper=WITHOUT_USERFAULTFD) as dst,
    ):
        src.set_capabilities(*POSTCOPY)
        dst.set_capabilities(*POSTCOPY)
        before = src.report()
        move_postcopy(src, dst)
        assert dst.ours["postcopy-pages"] > 0
        assert_unharmed(dst, before)


@pytest.mark.kvm
def test_source_without_userfaultfd(private_dir: Path) -> None:
    """Its writes cannot be tracked: every page counts as dirty in every pass."""
    words = (*SMALL, "--accel", "kvm")
    with (
        Source(private_dir, *words, wrapper=WITHOUT_USERFAULTFD) as src,
        Destination(private_dir, *words) as dst,
    ):
        src.wait_filled()
        src.set_capabilities(*POSTCOPY)
        dst.set_capabilities(*POSTCOPY)
        before = src.report()
        move_postcopy(src, dst)
        assert "every page counts as dirty" in src.ours["dirty-tracking"]
        assert_unharmed(dst, before)


def host_gib() -> int:
    """More than this host can have available, in GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    meminfo = dict(line.split(":") for line in lines)
    return 2 + (int(meminfo["MemTotal"].split()[0]) >> 20)


def test_refused_host_memory(private_dir: Path) -> None:
    """A guest that touches little and could touch more than the host has."""
    words = ("--memory", f"{host_gib()}G", "--accel", "process")
    with Source(private_dir, *words, "--append", "area=4M") as src:
        src.wait_filled()
        src.set_capabilities()
        with Destination(private_dir, *words) as dst:
            dst.set_capabilities()
            texts = (f"{host_gib() << 10} MiB", "available", "--overcommit")
            assert_refused(src, dst, *texts)
        assert_moves(src, private_dir, *words[:2], "--overcommit", accel="process")


def test_hugepage_pool_too_small(private_dir: Path) -> None:
    words = ("--memory", "512G", "--hugepages", "2M", "--accel", "process")
    with (
        pytest.raises(RuntimeError, match=r"set vm\.nr_hugepages to 262144 more"),
        Destination(private_dir, *words),
    ):
        pass
