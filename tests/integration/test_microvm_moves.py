"""A guest is saved in one process of the built-in program and goes on in another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.accels import both_accels
from support.fake_daemon import MissingPages
from support.microvm import sweeps
from support.ram import HUGE_PAGE, MIB, PAGE
from support.report import REPORT_ADDRESS, bucket_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.fake_daemon import Attached
    from support.microvm import Bench
    from support.report import Report

pytestmark = pytest.mark.userfaultfd


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


@pytest.mark.parametrize("vcpus", [1, 4])
@both_accels
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
@both_accels
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
@both_accels
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
@both_accels
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


@both_accels
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
