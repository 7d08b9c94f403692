"""What processes use: CPU time with the guest's share apart, and memory.

The same measures for every contender. Times come from the scheduler, in
nanoseconds: the clock of a process goes on counting what its threads used that
have ended meanwhile, as the threads of a migration do.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_QEMU_VCPU: Final = re.compile(r"CPU \d+/")  # needs -name debug-threads=on
_MICROVM: Final = "microvm"


# Python has no names for these; the first is Linux 5.14.
MADV_POPULATE_WRITE: Final = 23
MAP_HUGETLB: Final = 0x40000
SPARE: Final = 2 << 30  # bytes left alone when memory is touched


class Usage:
    """CPU time of some processes from now until `end`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._first = self._now()

    def end(self) -> tuple[float, float]:
        """Seconds of all threads but the guest's vCPUs, seconds of the vCPUs."""
        total, vcpus = (
            now - first for now, first in zip(self._now(), self._first, strict=True)
        )
        return total - vcpus, vcpus

    def _now(self) -> tuple[float, float]:
        return (
            sum(_process_seconds(pid) for pid in self._pids),
            sum(_vcpu_seconds(pid) for pid in self._pids),
        )


def _process_seconds(pid: int) -> float:
    # The kernel's number of another process's CPU clock; see clock_getcpuclockid.
    return time.clock_gettime(~pid << 3 | 2)


def _vcpu_seconds(pid: int) -> float:
    program = Path(f"/proc/{pid}/comm").read_text().strip()
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _is_vcpu(program, pid, task):
                nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def _is_vcpu(program: str, pid: int, task: Path) -> bool:
    if program == _MICROVM:  # one thread for each vCPU, and the first
        return task.name != str(pid)
    return _QEMU_VCPU.match((task / "comm").read_text()) is not None


def own_bytes(pid: int) -> int:
    """Memory of a process besides shared memory: anonymous and file pages."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) << 10


def pretouch(size: int) -> None:
    """Take so much memory, or what there is, and give it back.

    The first touch of memory that a hypervisor has taken back costs 5 to 20 us
    a page, which the first contender alone would pay. So each does this right
    before it migrates, and in huge pages: what is taken back is free blocks of
    2 MiB, within seconds.
    """
    size = max(min(size, _available() - SPARE), mmap.PAGESIZE)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_POPULATE_WRITE)


def pretouch_pool(size: int) -> None:
    """The same for the pool of huge pages, which keeps its pages."""
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB
    with mmap.mmap(-1, size, flags=flags) as memory:
        memory.madvise(MADV_POPULATE_WRITE)


def _available() -> int:
    """Bytes of memory that are free, or can be made so."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LookupError("no MemAvailable in /proc/meminfo")
