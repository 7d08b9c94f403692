"""Can this host migrate? The answer of `srcd check` and `dstd check`.

One line for each need. FAIL: a migration of the usual kind will not work. WARN:
it works, but slower or with less to see. Both end with the way out. It is this
user's answer: run it as the user who will run the guest.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import struct
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.errors import HostError
from common.host import memory, userfaultfd
from common.native._native import lib
from common.native.ram import negotiate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.config import Question, ServeConfig

HUGE_PAGE: Final = 2 << 20
# Two channels, descriptors of the guest, bitmaps; every client has one more.
FEW_DESCRIPTORS: Final = 256

_POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_IPV4: Final = Path("/proc/sys/net/ipv4")
_LATENCY: Final = "/dev/cpu_dma_latency"


class Level(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is so, and what to do if it should not be."""

    level: Level
    need: str
    says: str
    fix: str = ""

    def __str__(self) -> str:
        end = f"; {self.fix}" if self.fix else ""
        return f"{self.level:<4}  {self.need}: {self.says}{end}"


def answer(question: Question, *, incoming: bool) -> int:
    """Print it; returns the exit status, 1 if anything is FAIL."""
    if question.about == "check-config":
        print(f"{question.path}: OK")
        return 0
    findings = look(question.config, incoming=incoming)
    for finding in findings:
        print(finding)
    bad = sum(finding.level is Level.FAIL for finding in findings)
    poor = sum(finding.level is Level.WARN for finding in findings)
    verb = "cannot" if bad else "can"
    direction = "take guests in" if incoming else "send guests away"
    print(f"this host {verb} {direction}: {bad} FAIL, {poor} WARN")
    return 1 if bad else 0


def look(config: ServeConfig | None, *, incoming: bool) -> list[Finding]:
    """Everything one side of a migration needs of its host."""
    abilities = _userfaultfd(incoming=incoming)
    needs = _DESTINATION if incoming else _SOURCE
    return [*abilities, *(need(config) for need in needs)]


# --- userfaultfd and what hangs on it -------------------------------------------


def _userfaultfd(*, incoming: bool) -> list[Finding]:
    """The right to make one, and the abilities of one that was made."""
    name = "userfaultfd"
    lacks = (
        "postcopy needs it"
        if incoming
        else "without it every page counts as dirty in every pass"
    )
    try:
        fd, way = userfaultfd.make()
    except userfaultfd.Refused as refused:
        level = Level.FAIL if incoming else Level.WARN
        says = f"not permitted, and {lacks}: {refused}"
        return [Finding(level, name, says, userfaultfd.FIX)]
    try:
        abilities = negotiate(fd)
    except HostError as error:
        return [Finding(Level.FAIL, name, str(error), "Linux 4.11 has what is needed")]
    finally:
        os.close(fd)
    found = Finding(Level.OK, name, f"permitted {way}")
    return [found, *(_abilities_in if incoming else _abilities_out)(abilities)]


def _abilities_in(abilities: int) -> list[Finding]:
    return [
        _ability(
            abilities & lib.UFFD_CAN_MINOR,
            "pages in place (MINOR)",
            "pages are copied twice",
            "Linux 5.14 has it",
        ),
        _ability(
            abilities & lib.UFFD_CAN_THREAD_ID,
            "blocktime (THREAD_ID)",
            "query-migrate cannot tell which vCPU waited",
            "Linux 4.14 has it",
        ),
    ]


def _abilities_out(abilities: int) -> list[Finding]:
    worse = "every page counts as dirty in every pass, so precopy rarely completes"
    return [
        _ability(
            abilities & lib.UFFD_CAN_WP_ASYNC,
            "dirty tracking (WP_ASYNC)",
            worse,
            "Linux 6.7 has it; use postcopy",
        ),
        _ability(
            _can_scan_pagemap(),
            "dirty tracking (PAGEMAP_SCAN)",
            worse,
            "Linux 6.7 has it; use postcopy",
        ),
    ]


def _ability(there: object, name: str, otherwise: str, fix: str) -> Finding:
    if there:
        return Finding(Level.OK, name, "the kernel has it")
    return Finding(Level.WARN, name, f"the kernel lacks it: {otherwise}", fix)


_PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_ARGUMENT: Final = struct.Struct("=12Q")
_PRESENT: Final = 8


def _can_scan_pagemap() -> bool:
    """Ask about one page; only a kernel without the call refuses."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    members = [_SCAN_ARGUMENT.size, 0, start, start + mmap.PAGESIZE]
    members += [0, 0, 0, 0, 0, _PRESENT, 0, _PRESENT]
    argument = bytearray(_SCAN_ARGUMENT.pack(*members))
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


# --- the rest -------------------------------------------------------------------


_GET_API_VERSION: Final = 0xAE00
_CREATE_VM: Final = 0xAE01
_KVM_VERSION: Final = 12


def _kvm(config: ServeConfig | None) -> Finding:
    """Needed by the guest's process; the daemon itself never opens it."""
    fix = "add the user to the group kvm; in a virtual machine, enable nesting"
    level = Level.FAIL if config and config.guest.accel == "kvm" else Level.WARN
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            if fcntl.ioctl(device, _GET_API_VERSION) != _KVM_VERSION:
                return Finding(level, "/dev/kvm", "has another API", fix)
            os.close(fcntl.ioctl(device, _CREATE_VM, 0))
        finally:
            os.close(device)
    except OSError as error:
        says = f"{error.strerror}; the built-in guest runs as threads"
        return Finding(level, "/dev/kvm", says, fix)
    return Finding(Level.OK, "/dev/kvm", "makes virtual machines")


def _memory(config: ServeConfig | None) -> Finding:
    """RAM of the guest, unless it comes from the pool of huge pages."""
    room = memory.available()
    wanted = 0
    if config and config.guest.memory and not config.guest.hugepages:
        wanted = config.guest.memory
    says = f"{room >> 20} MiB available"
    if wanted <= room:
        return Finding(Level.OK, "memory", says)
    says += f", the guest has {wanted >> 20} MiB"
    if config and config.overcommit:
        return Finding(Level.WARN, "memory", says, "overcommit is on: keep it empty")
    return Finding(Level.FAIL, "memory", says, "free memory, or move a smaller guest")


_COLLAPSE: Final = 25  # MADV_COLLAPSE


def _collapse(_: ServeConfig | None) -> Finding:
    """Try it, on memory of our own: there is no other way to ask."""
    name = "huge pages on request (MADV_COLLAPSE)"
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 2 * HUGE_PAGE, kind) as area:
        for at in range(0, len(area), mmap.PAGESIZE):
            area[at] = 1
        try:
            area.madvise(_COLLAPSE)
        except OSError as error:
            says = f"{error.strerror}; placing pages takes longer"
            fix = "Linux 6.1 has it, with transparent huge pages built in"
            return Finding(Level.WARN, name, says, fix)
    return Finding(Level.OK, name, "the kernel has it")


def _huge_pages(config: ServeConfig | None) -> Finding:
    name = "pool of huge pages"
    try:
        free = int(_POOL.read_text())
    except OSError as error:
        free, says = 0, f"2 MiB pages: {error.strerror}"
    else:
        says = f"{free} free pages of 2 MiB"
    guest = config.guest if config else None
    if guest is None or not guest.hugepages:
        return Finding(Level.OK, name, f"{says}; none are asked for")
    wanted = -(-(guest.memory or 0) // HUGE_PAGE)
    if wanted <= free:
        return Finding(Level.OK, name, f"{says}, the guest takes {wanted}")
    fix = f"sysctl vm.nr_hugepages={wanted}, or leave hugepages out"
    return Finding(Level.FAIL, name, f"{says}, the guest takes {wanted}", fix)


def _congestion(config: ServeConfig | None) -> Finding:
    """Whether this user may choose the one that the configuration names."""
    name = "congestion control"
    usual = (_IPV4 / "tcp_congestion_control").read_text().strip()
    wanted = config.tuning.congestion if config else None
    if wanted is None:
        return Finding(Level.OK, name, f"the system's, {usual}")
    # tcp(7): CAP_NET_ADMIN may use all that are available, anybody else these.
    allowed = (_IPV4 / "tcp_allowed_congestion_control").read_text().split()
    if wanted in allowed:
        return Finding(Level.OK, name, f"{wanted} can be used")
    fix = f"modprobe tcp_{wanted}, and name it in tcp_allowed_congestion_control"
    says = f"{wanted} is not among {', '.join(allowed)}"
    return Finding(Level.FAIL, name, says, fix)


def _descriptors(_: ServeConfig | None) -> Finding:
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"up to {limit} at a time"
    if limit == resource.RLIM_INFINITY or limit >= FEW_DESCRIPTORS:
        return Finding(Level.OK, "descriptors", says)
    fix = f"LimitNOFILE= in the unit, or ulimit -n {FEW_DESCRIPTORS}"
    return Finding(Level.WARN, "descriptors", says, fix)


def _latency(config: ServeConfig | None) -> Finding:
    name = "processors stay awake"
    if config and not config.tuning.awake:
        return Finding(Level.OK, name, "not asked for (let-sleep)")
    if os.access(_LATENCY, os.W_OK):
        return Finding(Level.OK, name, f"{_LATENCY} can be written")
    says = f"{_LATENCY} cannot be written: faults wait for processors to wake up"
    return Finding(Level.WARN, name, says, "udev rule, see docs/operations.md")


_BOTH: Final[Sequence[Callable[[ServeConfig | None], Finding]]] = (
    _kvm,
    _memory,
    _huge_pages,
    _descriptors,
    _latency,
)
_SOURCE: Final = (*_BOTH, _congestion)
_DESTINATION: Final = (*_BOTH, _collapse)
