"""What the test guest tells about itself, from the bytes of its RAM.

The layout is described in common/native/microvm/guest/report.h. Read the
REPORT_SIZE bytes at guest physical address REPORT_ADDRESS, which is also their
offset in the RAM block, by any means: a mapping of the memfd, ``pread``, QEMU's
``pmemsave``. Numbers of a running guest may belong to neighbouring moments.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

REPORT_ADDRESS = 0x200000
REPORT_MAGIC = int.from_bytes(b"postcopy", "little")
REPORT_VERSION = 1
VCPUS_MAX = 8
PAGE = 4096
BUCKETS = 512
SLOW_MAX = 128
REPORT_SIZE = PAGE + VCPUS_MAX * 3 * PAGE

_HEADER = struct.Struct("<QIIQQQQQQII")
_COUNTERS = struct.Struct("<II8QQQQQIIQQQQ")
_HISTOGRAM = struct.Struct(f"<{BUCKETS}Q")
_SLOW = struct.Struct("<QQQQ")

STATES = ("absent", "filling", "running")
MODES = ("writing", "reading", "idle")


class ReportError(ValueError):
    """The bytes are no report: the guest has not begun, or they are broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongPage:
    """The first wrong page a vCPU found."""

    page: int
    word: int
    expected: int
    got: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowAccess:
    """An access that took at least 100 us; times in TSC ticks."""

    tsc: int
    ticks: int
    page: int
    counter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuReport:
    """One vCPU's counters, its histogram and its last slow accesses."""

    state: str
    counter: int
    checked: int
    wrong: int
    written: int
    filled: int
    sweeps: int
    slice_first: int
    slice_pages: int
    first_wrong: WrongPage | None
    slowest_ticks: int
    slowest_page: int
    slow_count: int
    slow: tuple[SlowAccess, ...]
    histogram: tuple[int, ...]

    @classmethod
    def parse(cls, data: bytes) -> VcpuReport:
        numbers = _COUNTERS.unpack_from(data)
        state, _, counter, checked, wrong, written, filled, sweeps = numbers[:8]
        slice_first, slice_pages, *first_wrong = numbers[8:15]
        slowest_ticks, slowest_page, _, slow_count = numbers[16:20]
        if state >= len(STATES):
            raise ReportError(f"a vCPU in the unknown state {state}")
        return cls(
            state=STATES[state],
            counter=counter,
            checked=checked,
            wrong=wrong,
            written=written,
            filled=filled,
            sweeps=sweeps,
            slice_first=slice_first,
            slice_pages=slice_pages,
            first_wrong=_wrong_page(first_wrong) if wrong else None,
            slowest_ticks=slowest_ticks,
            slowest_page=slowest_page,
            slow_count=slow_count,
            slow=_slow_accesses(data[2 * PAGE :], slow_count),
            histogram=_HISTOGRAM.unpack_from(data, PAGE),
        )


def _wrong_page(numbers: list[int]) -> WrongPage:
    page, word, expected, got, generation = numbers
    return WrongPage(
        page=page, word=word, expected=expected, got=got, generation=generation
    )


def _slow_accesses(ring: bytes, count: int) -> tuple[SlowAccess, ...]:
    """Oldest first; only the last SLOW_MAX of `count` are still there."""
    accesses = []
    for number in range(max(0, count - SLOW_MAX), count):
        entry = _SLOW.unpack_from(ring, number % SLOW_MAX * _SLOW.size)
        tsc, ticks, page, counter = entry
        accesses.append(SlowAccess(tsc=tsc, ticks=ticks, page=page, counter=counter))
    return tuple(accesses)


def bucket_of(ticks: int) -> int:
    """The bucket of the histogram that counts accesses of this length."""
    if ticks < 8:
        return ticks
    log = ticks.bit_length() - 1
    return 8 * log + (ticks >> (log - 3) & 7)


def bucket_end(bucket: int) -> int:
    """The smallest number of ticks that is too long for this bucket."""
    if bucket < 8:
        return bucket + 1
    log, eighth = divmod(bucket, 8)
    # Buckets 8 to 23 are never used: 8 ticks are the start of bucket 24.
    return (8 + eighth + 1) << (log - 3) if log >= 3 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole guest."""

    tsc_khz: int
    area_offset: int
    area_pages: int
    table_offset: int
    seed: int
    write_rate: int
    mode: str
    filled: bool
    vcpus: tuple[VcpuReport, ...]

    @classmethod
    def parse(cls, data: bytes) -> Report:
        """Raise ReportError if these REPORT_SIZE bytes are no report."""
        if len(data) < REPORT_SIZE:
            raise ReportError(f"{len(data)} bytes, a report has {REPORT_SIZE}")
        magic, version, vcpus, tsc_khz, *rest = _HEADER.unpack_from(data)
        area_offset, area_pages, table_offset, seed, write_rate, mode, filled = rest
        if magic != REPORT_MAGIC:
            raise ReportError("the guest has not begun to report")
        if version != REPORT_VERSION or mode >= len(MODES):
            raise ReportError(f"version {version}, mode {mode}")
        if not 1 <= vcpus <= VCPUS_MAX:
            raise ReportError(f"{vcpus} vCPUs")
        return cls(
            tsc_khz=tsc_khz,
            area_offset=area_offset,
            area_pages=area_pages,
            table_offset=table_offset,
            seed=seed,
            write_rate=write_rate,
            mode=MODES[mode],
            filled=bool(filled),
            vcpus=tuple(
                VcpuReport.parse(data[start : start + 3 * PAGE])
                for start in range(PAGE, PAGE + vcpus * 3 * PAGE, 3 * PAGE)
            ),
        )

    @property
    def counter(self) -> int:
        return sum(v.counter for v in self.vcpus)

    @property
    def checked(self) -> int:
        return sum(v.checked for v in self.vcpus)

    @property
    def wrong(self) -> int:
        return sum(v.wrong for v in self.vcpus)

    @property
    def written(self) -> int:
        return sum(v.written for v in self.vcpus)

    @property
    def sweeps(self) -> int:
        """How often at least every page of the area has had its turn."""
        return min(v.sweeps for v in self.vcpus)

    @property
    def slow_count(self) -> int:
        return sum(v.slow_count for v in self.vcpus)

    @property
    def slowest_us(self) -> float:
        return self.us(max(v.slowest_ticks for v in self.vcpus))

    @property
    def histogram(self) -> list[int]:
        """Accesses by duration, all vCPUs together; see `bucket_of`."""
        return [
            sum(column)
            for column in zip(*(v.histogram for v in self.vcpus), strict=True)
        ]

    def us(self, ticks: int) -> float:
        """Microseconds of so many TSC ticks."""
        return ticks * 1000 / self.tsc_khz

    def latency_us(self, percent: float, since: Report | None = None) -> float:
        """A percentile of the accesses' durations, all or those after `since`.

        The upper end of its bucket, so up to 1/8 too long. 0 if there were no
        accesses.
        """
        counts = self.histogram
        if since is not None:
            counts = [a - b for a, b in zip(counts, since.histogram, strict=True)]
        return self.us(_percentile(counts, percent))


def _percentile(counts: list[int], percent: float) -> int:
    """Ticks that `percent` of the counted accesses did not exceed."""
    wanted = sum(counts) * percent / 100
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return bucket_end(bucket)
    return 0
