"""The built-in program's guests: one that checks its own memory, and broken ones."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import pytest
from support.accels import both_accels
from support.microvm import sweeps
from support.ram import MIB, PAGE

if TYPE_CHECKING:
    from pathlib import Path

    from support.microvm import Bench

pytestmark = pytest.mark.userfaultfd


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


@both_accels
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


@both_accels
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


@both_accels
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


@both_accels
def test_guest_idle_leaves_its_pages_alone(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, append="idle")
    vm.wait_line("filled")
    before = vmm.report()
    vm.until(lambda: vmm.report().counter > before.counter + 10)
    assert vmm.report().checked == 0


@both_accels
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
