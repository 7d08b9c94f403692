"""The built-in guest program against a fake daemon: the attach protocol, saving
in one process and loading in another, with KVM and without, and the test guest,
which checks its own memory.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import stat
import struct
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.fake_daemon import (
    Attached,
    FakeDaemon,
    MissingPages,
    RequestFailed,
)
from support.report import REPORT_ADDRESS, Report, ReportError, bucket_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAMS = Path(str(resources.files("common.native"))) / "bin"
PATIENCE = 60.0
MIB = 1 << 20
PAGE = 4096
HUGE_PAGE = 2 * MIB
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

pytestmark = pytest.mark.userfaultfd

KVM = pytest.param("kvm", marks=pytest.mark.kvm)


class Microvm:
    """A running microvm; its guest's serial output comes through a pipe."""

    def __init__(self, daemon: FakeDaemon, *words: str, memory: int) -> None:
        self.process = subprocess.Popen(
            [
                *(PROGRAMS / "microvm", "--attach", daemon.path),
                *("--memory", str(memory), *words),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_line(self, pattern: str) -> re.Match[str]:
        """The next line of serial output that matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the guest ended without saying {pattern!r}")

    def wait_end(self) -> tuple[int, str]:
        """Exit status and what was said on standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something in the guest's memory, which tells nobody."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            deadline = time.monotonic() + PATIENCE
            while not condition():
                assert time.monotonic() < deadline, "it never came true"
                ended, _, _ = select.select([pidfd], [], [], 0.005)
                assert not ended, self.wait_end()
        finally:
            os.close(pidfd)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Bench:
    """A fake daemon and the programs that a test starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.daemon = FakeDaemon(path)
        self.vms: list[Microvm] = []
        self.attached: list[Attached] = []

    def run(self, *words: str, memory: int) -> Microvm:
        vm = Microvm(self.daemon, *words, memory=memory)
        self.vms.append(vm)
        return vm

    def start(self, *words: str, memory: int = 32 * MIB) -> tuple[Microvm, Attached]:
        vm = self.run(*words, memory=memory)
        return vm, self.accept()

    def boot(
        self, *words: str, memory: int = 32 * MIB, append: str = ""
    ) -> tuple[Microvm, Attached]:
        kernel = str(PROGRAMS / "test-guest.elf")
        return self.start(
            *("--kernel", kernel, "--append", append, *words), memory=memory
        )

    def accept(self) -> Attached:
        vmm = self.daemon.accept()
        self.attached.append(vmm)
        return vmm

    def close(self) -> None:
        for closing in (*self.vms, *self.attached, self.daemon):
            closing.close()


@pytest.fixture
def bench(private_dir: Path) -> Iterator[Bench]:
    bench = Bench(private_dir / "guest")
    yield bench
    bench.close()


def read_report(vmm: Attached) -> Report | None:
    try:
        return vmm.report()
    except ReportError:
        return None


def sweeps(vmm: Attached) -> int:
    """How often the guest has checked all of its memory."""
    report = read_report(vmm)
    return report.sweeps if report and report.filled else 0


def move(source: Attached, destination: Attached) -> Report:
    """Stop, save, copy, load; the guest is paused in its new place."""
    source.request("stop")
    state = source.save()
    report = source.report()
    length = source.message["blocks"][0]["length"]
    for start in range(0, length, MIB):
        part = source.ram[start : start + MIB]
        if part.count(0) < len(part):
            destination.ram[start : start + MIB] = part
    destination.load(state)
    return report


# --- attaching ---------------------------------------------------------------


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_attach_message(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, "--vcpus", "2", "--machine", "m-7")
    message = vmm.message
    assert message["version"] == 1
    assert message["machine"] == "m-7"
    assert message["device"]["version"] == 1
    assert message["state"] == "running"
    assert message["pid"] == vm.process.pid
    threads = {
        int(path.name) for path in Path(f"/proc/{vm.process.pid}/task").iterdir()
    }
    assert len(message["vcpus"]) == 2
    assert set(message["vcpus"]) < threads
    [block] = message["blocks"]
    assert block["idstr"] == "ram"
    assert block["length"] == 32 * MIB
    assert block["page-size"] == PAGE
    assert block["base"] % HUGE_PAGE == 0
    assert list(vmm.descriptors) == ["userfaultfd", "pagemap", "block:ram"]


def test_attached_ram_cannot_shrink_and_is_not_inherited(bench: Bench) -> None:
    vm, vmm = bench.boot("--accel", "process")
    memfd = vmm.descriptors["block:ram"]
    assert stat.S_ISREG(os.fstat(memfd).st_mode)
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & SEALS == SEALS
    base = format(vmm.message["blocks"][0]["base"], "x")
    smaps = Path(f"/proc/{vm.process.pid}/smaps").read_text()
    of_ram = re.search(rf"^{base}-.*?^VmFlags: ([^\n]*)", smaps, re.S | re.M)
    assert of_ram is not None
    assert {"dc", "dd"} <= set(of_ram[1].split()), "DONTFORK and DONTDUMP"


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_incoming_ram_is_untouched(bench: Bench, accel: str) -> None:
    _, vmm = bench.start("--incoming", "--accel", accel)
    assert vmm.message["state"] == "incoming"
    assert os.fstat(vmm.descriptors["block:ram"]).st_blocks == 0


def test_waits_for_a_daemon_that_starts_later(private_dir: Path) -> None:
    bench = Bench(private_dir / "guest")
    bench.daemon.close()
    (private_dir / "guest").unlink()
    vm = bench.run("--incoming", "--accel", "process", memory=8 * MIB)
    # It has set everything up, so the next thing it does is to connect.
    vm.until(lambda: len(list(Path(f"/proc/{vm.process.pid}/task").iterdir())) == 2)
    bench.daemon = FakeDaemon(private_dir / "guest")
    bench.accept()
    bench.close()


def test_refused_at_first_ends_with_the_reason(bench: Bench) -> None:
    vm = bench.run("--incoming", "--accel", "process", memory=8 * MIB)
    bench.daemon.accept(refuse="the moon is in the wrong phase").close()
    status, errors = vm.wait_end()
    assert status == 1
    assert "the daemon refuses the guest: the moon is in the wrong phase" in errors


def test_attach_paused(bench: Bench) -> None:
    vm, vmm = bench.boot("--paused", "--accel", "process")
    assert vmm.message["state"] == "paused"
    assert vmm.report().counter == 0
    vmm.request("cont")
    vm.wait_line("filled")


# --- requests ----------------------------------------------------------------


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_stop_and_cont_may_repeat(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, "--vcpus", "2")
    vm.wait_line("filled")
    for _ in range(20):
        vmm.request("stop")
        counter = vmm.report().counter
        vmm.request("stop")
        vmm.save()
        assert vmm.report().counter == counter
        vmm.request("cont")
        vmm.request("cont")
        vm.until(lambda n=counter: vmm.report().counter > n)
    assert vmm.report().wrong == 0


def test_unknown_request_is_answered(bench: Bench) -> None:
    _, vmm = bench.start("--incoming", "--accel", "process")
    with pytest.raises(RequestFailed, match="unknown request 'dance'"):
        vmm.request("dance")
    with pytest.raises(RequestFailed, match="waits for its state"):
        vmm.request("cont")


def test_save_of_a_running_guest_fails(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    with pytest.raises(RequestFailed, match="the guest is running, not paused"):
        vmm.save()
    with pytest.raises(RequestFailed, match="the guest is running, not incoming"):
        vmm.load(b"x")


def test_quit(bench: Bench) -> None:
    vm, vmm = bench.boot("--accel", "process")
    vmm.request("quit")
    assert vm.wait_end() == (0, "")


def test_malformed_request_ends_the_connection(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    vmm.send({"request": "stop", "id": -1})
    with pytest.raises(EOFError):
        vmm.receive()
    assert bench.accept().message["state"] == "running"


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_load_refuses_bad_state(bench: Bench, accel: str) -> None:
    _, source = bench.boot("--accel", accel)
    source.request("stop")
    state = source.save()
    _, destination = bench.start("--incoming", "--accel", accel)
    bad: list[tuple[bytes, dict[str, object], str]] = [
        (state, {"name": "qemu"}, "not of 'qemu'"),
        (state, {"version": 2}, "version 2 is newer"),
        (state, {"length": len(state) + 1}, f"no {len(state) + 1} bytes"),
        (state, {"length": 1 << 40}, "expected 1 to"),
        (state[:-1], {}, "ends inside of record"),
        (state + b"x", {}, "1 bytes follow"),
        (b"QEVM" + state[4:], {}, "no device state of microvm"),
    ]
    for data, changes, reason in bad:
        with pytest.raises(RequestFailed, match=re.escape(reason)):
            destination.load(data, **changes)
    destination.load(state)


def test_load_refuses_another_number_of_vcpus(bench: Bench) -> None:
    _, source = bench.boot("--accel", "process", "--vcpus", "2")
    source.request("stop")
    state = source.save()
    _, destination = bench.start("--incoming", "--accel", "process")
    with pytest.raises(RequestFailed, match="of 2 vCPUs, this guest has 1"):
        destination.load(state)


# --- moving ------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_goes_on_in_another_process(bench: Bench, accel: str, vcpus: int) -> None:
    words = ("--accel", accel, "--vcpus", str(vcpus))
    vm, vmm = bench.boot(*words)
    for _ in range(3):
        vm.until(lambda vmm=vmm: sweeps(vmm) >= 1)
        new_vm, new_vmm = bench.start("--incoming", *words)
        before = move(vmm, new_vmm)
        assert new_vmm.report().counter == before.counter
        vmm.request("quit")
        new_vmm.request("cont")
        goes_on = new_vm.wait_line(r"goes on at counter=(\d+)")
        assert int(goes_on[1]) >= before.counter
        vm, vmm = new_vm, new_vmm
        vm.until(lambda vmm=vmm, n=before.sweeps: sweeps(vmm) >= n + 2)
        after = vmm.report()
        assert after.counter > before.counter
        assert after.wrong == 0, after.vcpus


@pytest.mark.hugepages
@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_with_huge_pages_goes_on(
    bench: Bench, accel: str, reserve_hugepages: Callable[[int], None]
) -> None:
    reserve_hugepages(32)
    words = ("--accel", accel, "--hugepages", "2M")
    vm, vmm = bench.boot(*words)
    assert vmm.message["blocks"][0]["page-size"] == HUGE_PAGE
    vm.until(lambda: sweeps(vmm) >= 1)
    new_vm, new_vmm = bench.start("--incoming", *words)
    before = move(vmm, new_vmm)
    new_vmm.request("cont")
    new_vm.until(lambda: sweeps(new_vmm) >= before.sweeps + 2)
    assert new_vmm.report().wrong == 0


@pytest.mark.hugepages
@pytest.mark.parametrize("accel", [KVM, "process"])
def test_huge_pages_come_on_demand(
    bench: Bench, accel: str, reserve_hugepages: Callable[[int], None]
) -> None:
    reserve_hugepages(32)
    words = ("--accel", accel, "--hugepages", "2M")
    vm, vmm = bench.boot(*words)
    vm.until(lambda: sweeps(vmm) >= 1)
    vmm.request("stop")
    new_vm, new_vmm = bench.start("--incoming", *words)
    pages = MissingPages(new_vmm)
    new_vmm.load(vmm.save())
    new_vmm.request("cont")
    missing = set(range(vmm.report().area_offset, 32 * MIB, HUGE_PAGE))
    while missing:
        offset = pages.next_fault()
        pages.place(offset, vmm.ram[offset : offset + HUGE_PAGE])
        missing.discard(offset)
    new_vm.wait_line("alive")
    assert new_vmm.report().wrong == 0


def test_too_few_huge_pages(bench: Bench) -> None:
    vm = bench.run(
        *("--incoming", "--hugepages", "2M", "--accel", "process"), memory=1 << 40
    )
    status, errors = vm.wait_end()
    assert status == 1
    assert "set vm.nr_hugepages" in errors


@pytest.mark.kvm
def test_ram_above_4_gib_goes_on(bench: Bench) -> None:
    words = ("--accel", "kvm")
    vm, vmm = bench.boot(*words, memory=4096 * MIB, append="area=16M")
    vm.until(lambda: sweeps(vmm) >= 1)
    report = vmm.report()
    assert report.area_offset == 4080 * MIB
    new_vm, new_vmm = bench.start("--incoming", *words, memory=4096 * MIB)
    vmm.request("stop")
    state = vmm.save()
    for start, end in ((0, 16 * MIB), (report.area_offset, 4096 * MIB)):
        new_vmm.ram[start:end] = vmm.ram[start:end]
    new_vmm.load(state)
    new_vmm.request("cont")
    new_vm.until(lambda: sweeps(new_vmm) >= report.sweeps + 3)
    assert new_vmm.report().wrong == 0


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("accel", [KVM, "process"])
def test_stop_while_waiting_for_a_page(bench: Bench, accel: str, vcpus: int) -> None:
    """Then load what was saved there in a third process, which gets all pages."""
    words = ("--accel", accel, "--vcpus", str(vcpus))
    vm, vmm = bench.boot(*words, memory=16 * MIB)
    vm.until(lambda: sweeps(vmm) >= 1)
    vmm.request("stop")
    ram = vmm.ram[:]
    before = vmm.report()

    _, waiting = bench.start("--incoming", *words, memory=16 * MIB)
    pages = MissingPages(waiting)
    # Where KVM itself walks the guest's page tables and reads its code, it
    # waits for them in a place that no signal gets it out of.
    for offset in range(0, REPORT_ADDRESS, PAGE):
        pages.place(offset, ram[offset : offset + PAGE])
    waiting.load(vmm.save())
    waiting.request("cont")
    for _ in range(20):
        offset = pages.next_fault()
        waiting.request("stop")
        waiting.request("cont")
        pages.place(offset, ram[offset : offset + PAGE])
    pages.next_fault()
    waiting.request("stop")
    state = waiting.save()
    waiting.request("quit")

    # Pages that the guest has changed in the meantime are in its own RAM.
    last_vm, last = bench.start("--incoming", *words, memory=16 * MIB)
    memfd = waiting.descriptors["block:ram"]
    last.ram[:] = ram
    for start, end in data_ranges(memfd):
        last.ram[start:end] = os.pread(memfd, end - start, start)
    last.load(state)
    last.request("cont")
    last_vm.until(lambda: sweeps(last) >= before.sweeps + 2)
    assert last.report().counter > before.counter
    assert last.report().wrong == 0


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Where the file has pages; looking makes none, as reading through a map."""
    length = os.fstat(fd).st_size
    end = 0
    while end < length:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_all_pages_come_on_demand(bench: Bench, accel: str) -> None:
    words = ("--accel", accel, "--vcpus", "2")
    vm, vmm = bench.boot(*words, memory=8 * MIB)
    vm.until(lambda: sweeps(vmm) >= 1)
    vmm.request("stop")
    new_vm, new_vmm = bench.start("--incoming", *words, memory=8 * MIB)
    pages = MissingPages(new_vmm)
    new_vmm.load(vmm.save())
    new_vmm.request("cont")
    before = vmm.report()
    area = range(before.area_offset, 8 * MIB, PAGE)
    missing = set(area)
    while missing:
        offset = pages.next_fault()
        pages.place(offset, vmm.ram[offset : offset + PAGE])
        missing.discard(offset)
    new_vm.wait_line("alive")
    new_vmm.request("stop")
    report = new_vmm.report()
    assert report.wrong == 0
    slow = bucket_of(5 * report.tsc_khz // 1000)
    waited = sum(report.histogram[slow:]) - sum(before.histogram[slow:])
    # All but the last access of each vCPU, which the stop may have cut short.
    assert waited >= len(area) - 2, "each page was waited for"


# --- when the daemon goes away -----------------------------------------------


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_daemon_goes_away_and_another_comes(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel)
    vm.wait_line("filled")
    base = vmm.message["blocks"][0]["base"]
    for name in ("received", "second", "second", "third"):
        fd = os.memfd_create(name)
        os.write(fd, name.encode())
        vmm.request("keep", {"kept": fd}, name=name)
        os.close(fd)
    vmm.request("forget", name="third")
    with pytest.raises(RequestFailed, match="nothing is kept under the name 'third'"):
        vmm.request("forget", name="third")
    counter = vmm.report().counter
    vmm.close()
    bench.attached.remove(vmm)

    again = bench.accept()
    assert again.message["state"] == "running"
    assert again.message["blocks"][0]["base"] == base
    kept = {name for name in again.descriptors if name.startswith("keep:")}
    assert kept == {"keep:received", "keep:second"}
    assert os.pread(again.descriptors["keep:received"], 99, 0) == b"received"
    vm.until(lambda: again.report().counter > counter)
    assert again.report().wrong == 0


def test_daemon_goes_away_from_a_paused_and_an_incoming_guest(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    vmm.request("stop")
    state = vmm.save()
    ram = vmm.ram[:]
    vmm.close()
    bench.attached.remove(vmm)
    assert bench.accept().message["state"] == "paused"

    _, vmm = bench.start("--incoming", "--accel", "process")
    vmm.close()
    bench.attached.remove(vmm)
    again = bench.accept()
    assert again.message["state"] == "incoming"
    again.ram[:] = ram
    again.load(state)
    again.request("cont")


def test_refused_again_is_tried_again(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    vmm.close()
    bench.attached.remove(vmm)
    for _ in range(3):
        bench.daemon.accept(refuse="not yet").close()
    assert bench.accept().message["state"] == "running"


# --- the guest ---------------------------------------------------------------


def kernel(code: bytes) -> bytes:
    """An ELF file with this 32-bit code at its PVH entry, 2 MiB."""
    entry = 2 * MIB
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen", entry)
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0),
    )
    at = 64 + 2 * 56
    table = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)
    at += len(note)
    table += struct.pack("<IIQQQQQQ", 1, 5, at, 0, entry, len(code), PAGE, 1)
    return header + table + note + code


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param(b"\x0f\x0b", "triple fault on vCPU 0", id="ud2"),
        pytest.param(b"\xb0\xfe\xe6\x64\xf4", "reset itself", id="reset"),
    ],
)
def test_shutdown_event(
    bench: Bench, private_dir: Path, code: bytes, reason: str
) -> None:
    (private_dir / "kernel").write_bytes(kernel(code))
    vm, vmm = bench.start("--kernel", str(private_dir / "kernel"), "--accel", "kvm")
    event = vmm.wait_event()
    assert event["event"] == "shutdown"
    assert reason in event["data"]["reason"]
    vmm.request("stop")
    vmm.save()
    vmm.close()
    bench.attached.remove(vmm)
    status, errors = vm.wait_end()
    assert status == 1
    assert reason in errors


@pytest.mark.kvm
def test_kernel_without_pvh_entry(bench: Bench) -> None:
    vm = bench.run("--kernel", "/bin/true", "--accel", "kvm", memory=8 * MIB)
    status, errors = vm.wait_end()
    assert status == 1
    assert "cannot boot /bin/true: " in errors


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_finds_a_changed_byte(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel)
    vm.wait_line("filled")
    vmm.request("stop")
    report = vmm.report()
    at = report.area_offset + 100 * PAGE + 8 * 7
    vmm.ram[at] ^= 1
    vmm.request("cont")
    line = vm.wait_line(r"WRONG page (\d+) word (\d+)")
    assert (line[1], line[2]) == ("100", "7")
    found = vmm.report()
    assert found.wrong == 1
    wrong = found.vcpus[0].first_wrong
    assert wrong is not None
    assert (wrong.page, wrong.word) == (100, 7)
    assert wrong.expected ^ wrong.got == 1


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_finds_a_stale_page(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel)
    vm.wait_line("filled")
    vmm.request("stop")
    start = vmm.report().area_offset + 100 * PAGE
    old = vmm.ram[start : start + PAGE]
    vmm.request("cont")
    vm.until(lambda: vmm.ram[start : start + PAGE] != old)
    vmm.request("stop")
    vmm.ram[start : start + PAGE] = old
    vmm.request("cont")
    line = vm.wait_line(r"WRONG page (\d+) .*generation (\d+), the page says (\d+)")
    assert line[1] == "100"
    assert int(line[2]) > int(line[3])


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_options(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot(
        *("--accel", accel, "--vcpus", "2"),
        append="area=4M seed=7 read-only sweep=1",
    )
    filled = vm.wait_line(r"filled (\d+) pages")
    assert int(filled[1]) == 1024
    vm.until(lambda: sweeps(vmm) >= 2)
    vmm.request("stop")
    report = vmm.report()
    assert (report.area_pages, report.area_offset) == (1024, 28 * MIB)
    assert (report.seed, report.mode, len(report.vcpus)) == (7, "reading", 2)
    assert report.written == report.wrong == 0
    assert report.checked >= 2 * 1024
    # A vCPU may have been stopped between two of its counters.
    assert 0 <= report.checked + 1024 - report.counter <= 2
    assert 0 <= sum(report.histogram) - report.checked <= 2


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_idle_leaves_its_pages_alone(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, append="idle")
    vm.wait_line("filled")
    before = vmm.report()
    vm.until(lambda: vmm.report().counter > before.counter + 10)
    assert vmm.report().checked == 0


@pytest.mark.parametrize("accel", [KVM, "process"])
def test_guest_keeps_its_write_rate(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, append=f"write-rate={8 * MIB}")
    vm.wait_line("filled")
    vm.wait_line("alive")
    start, before = time.monotonic(), vmm.report()
    vm.wait_line("alive")
    vm.wait_line("alive")
    seconds, after = time.monotonic() - start, vmm.report()
    rate = (after.written - before.written) * PAGE / seconds
    # Less on a busy machine, never more.
    assert 2 * MIB < rate < 10 * MIB
