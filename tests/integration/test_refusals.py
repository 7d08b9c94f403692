"""A destination that cannot take the guest refuses before the source stops it.

Every test looks at both sides: the source's guest was never stopped, still runs
and finds no wrong page; both sides say what is the matter and what to do about
it; and the next migration, to a destination that fits, succeeds.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import processes
from support.daemons import (
    POSTCOPY,
    PREEMPT,
    PROGRESS,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    move_precopy,
)

from common.qmp.client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.report import Report

MIB = 1 << 20
SMALL = ("--memory", "32M")
# These guests have to go on unharmed, not to fill a processor meanwhile.
STEADY = ("--append", "write-rate=40M")
PRECOPY: tuple[str, ...] = ()
PATIENCE = 60.0

KVM = pytest.param("kvm", marks=pytest.mark.kvm)
BOTH_ACCELS = pytest.mark.parametrize("accel", [KVM, "process"])
BOTH_WAYS = pytest.mark.parametrize(
    "capabilities",
    [pytest.param(PRECOPY, id="precopy"), pytest.param(POSTCOPY, id="postcopy")],
)

pytestmark = pytest.mark.userfaultfd


# --- the source -------------------------------------------------------------------


@contextmanager
def source(directory: Path, *words: str, accel: str = "process") -> Iterator[Source]:
    """A source whose guest has begun to write and check its memory."""
    words = (*(words or SMALL), *STEADY, "--accel", accel)
    with Source(directory, *words) as src:
        src.wait_filled()
        src.set_capabilities()
        yield src


def attempt(src: Source, uri: str) -> str:
    """A migration that must not succeed; returns the source's `error-desc`.

    The guest is not even stopped for a moment, and goes on.
    """
    before = src.report()
    src.qmp.events()
    src.migrate(uri)
    assert src.wait_status("failed", "completed") == "failed"
    assert "device" not in src.statuses
    assert "STOP" not in [event["event"] for event in src.qmp.events()]
    assert_runs_on(src, before)
    return src.query()["error-desc"]


def assert_runs_on(src: Source, before: Report) -> None:
    assert src.execute("query-status") == {"status": "running", "running": True}
    report = src.wait_report(lambda r: r.counter > before.counter + PROGRESS)
    assert report.wrong == 0, report


def assert_refused(src: Source, dst: Destination, *texts: str) -> None:
    """Both sides fail and say the same, which has all these texts in it."""
    theirs = attempt(src, dst.listen())
    assert dst.wait_status("failed", "completed") == "failed"
    ours = dst.query()["error-desc"]
    assert dst.execute("query-status") == {"status": "inmigrate", "running": False}
    # What the source says quotes the destination, up to its length limit.
    assert ours in theirs
    for text in texts:
        assert text in ours


def assert_moves(src: Source, directory: Path, *words: str, accel: str) -> None:
    """The guest that was refused is taken by a destination that fits it."""
    on = [c["capability"] for c in capabilities(src) if c["state"]]
    words = (*(words or SMALL), "--accel", accel)
    with Destination(directory, *words, name="fits") as dst:
        dst.set_capabilities(*on)
        before = src.report()
        (move_postcopy if "postcopy-ram" in on else move_precopy)(src, dst)
        assert_unharmed(dst, before)


def capabilities(src: Source) -> list[dict[str, Any]]:
    return src.execute("query-migrate-capabilities")


# --- what does not fit ------------------------------------------------------------


@BOTH_ACCELS
@BOTH_WAYS
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


@BOTH_ACCELS
@BOTH_WAYS
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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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


def test_hugepage_pool_too_small(private_dir: Path) -> None:
    words = ("--memory", "512G", "--hugepages", "2M", "--accel", "process")
    with (
        pytest.raises(RuntimeError, match=r"set vm\.nr_hugepages to 262144 more"),
        Destination(private_dir, *words),
    ):
        pass


# --- what the host cannot do ----------------------------------------------------------

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


@BOTH_ACCELS
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


@BOTH_ACCELS
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


@BOTH_WAYS
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


# --- strangers ----------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", [PRECOPY, PREEMPT], ids=["plain", "preempt"])
@pytest.mark.parametrize(
    ("said", "texts"),
    [
        pytest.param(b"", ("closed",), id="nothing"),
        pytest.param(b"QEV", ("closed",), id="cut"),
        pytest.param(
            b"GET / HTTP/1.1\r\n\r\n", ("migration stream", "0x47455420"), id="http"
        ),
        pytest.param(
            bytes(range(256)) * 64, ("migration stream", "0x10203"), id="bytes"
        ),
        pytest.param(b"QEVM\0\0\0\2", ("version",), id="version"),
        pytest.param(
            b"\x11\x22\x33\x44" + bytes(60), ("multifd", "switch it off"), id="multifd"
        ),
    ],
)
def test_stranger_on_the_port(
    private_dir: Path,
    capabilities: tuple[str, ...],
    said: bytes,
    texts: tuple[str, ...],
) -> None:
    """It fails the incoming migration, as in QEMU, and nothing but that."""
    with Destination(private_dir, *SMALL, "--accel", "process") as dst:
        dst.set_capabilities(*capabilities)
        path = dst.listen(f"unix:{private_dir}/incoming").removeprefix("unix:")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            stranger.sendall(said)
        assert dst.wait_status("failed", "completed") == "failed"
        for text in texts:
            assert text in dst.query()["error-desc"]
        assert dst.execute("query-status") == {"status": "inmigrate", "running": False}
        assert "Traceback" not in dst.said


def test_stranger_beside_the_source(private_dir: Path) -> None:
    """Connections that nobody expects are closed and harm nobody."""
    with (
        source(private_dir) as src,
        Destination(private_dir, *SMALL, "--accel", "process") as dst,
    ):
        dst.set_capabilities()
        src.set_parameters(max_bandwidth=MIB)
        uri = dst.listen(f"unix:{private_dir}/incoming")
        src.migrate(uri)
        src.wait_status("active")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(PATIENCE)
            stranger.connect(uri.removeprefix("unix:"))
            assert stranger.recv(1) == b""
        before = src.report()
        src.set_parameters(max_bandwidth=0)
        assert src.wait_status("completed", "failed") == "completed", src.said
        assert dst.wait_status("completed", "failed") == "completed", dst.said
        assert_unharmed(dst, before)


# --- deaths -------------------------------------------------------------------------


def kill(daemon: Source | Destination) -> None:
    """kill -9. Its built-in guest outlives it, which is not what is tested."""
    daemon.process.kill()
    daemon.process.wait()


def end_guests_left() -> None:
    for pid, name in processes.children().items():
        if name == "microvm":
            processes.end(pid)


@BOTH_ACCELS
@BOTH_WAYS
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


@BOTH_WAYS
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
