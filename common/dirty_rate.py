"""`calc-dirty-rate` and `query-dirty-rate`: how fast a guest writes to its RAM.

Page sampling looks at some pages now and again later, and so counts a page that
was written with what it held as clean. The dirty bitmap sees every write, where
the guest's process and the kernel can tell.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import trio

from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from common.guest.base import Guest, RamBlock
    from common.qmp.message import Json
    from common.qmp.server import Handler

PAGE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30
MS: Final = {"second": 1000, "millisecond": 1}
SHORTEST_MS: Final = 50
LONGEST_MS: Final = 60_000
FEWEST_SAMPLES, MOST_SAMPLES = 128, 16384  # per GiB
DEFAULT_SAMPLES: Final = 512
# Of a small guest too, or the result would be all or nothing.
LEAST_PAGES: Final = 512
SAMPLING, BITMAP = "page-sampling", "dirty-bitmap"


class Writes(Protocol):
    """What sees a guest's writes; `stop` ends it and gives all back."""

    def start(self) -> None: ...

    def sync(self) -> int: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What was asked for; `started` in seconds since the epoch."""

    milliseconds: int
    samples: int
    mode: str
    started: int


NEVER: Final = _Order(milliseconds=0, samples=0, mode=SAMPLING, started=0)


class DirtyRate:
    """Measures one guest, one measurement at a time.

    `writes` makes what sees writes, or None if nothing can. `problem` says why
    there can be no measurement now.
    """

    def __init__(
        self,
        guest: Guest,
        nursery: trio.Nursery,
        *,
        writes: Callable[[], Writes | None] = lambda: None,
        problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._guest = guest
        self._nursery = nursery
        self._writes = writes
        self._problem = problem
        self._order: _Order | None = None
        self._rate: int | None = None  # MiB/s
        self._scope = trio.CancelScope()
        self._idle = trio.Event()
        self._idle.set()

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"calc-dirty-rate": self._calculate, "query-dirty-rate": self._query}

    async def abandon(self) -> None:
        """A migration begins, and wants to see writes itself."""
        self._scope.cancel()
        await self._idle.wait()

    # -- commands

    async def _calculate(self, arguments: Mapping[str, Json]) -> Json:
        order = _order(arguments)
        if not self._idle.is_set():
            raise CommandError("the dirty rate is already being measured.")
        if problem := self._problem():
            raise CommandError(problem)
        writes = self._writes() if order.mode == BITMAP else None
        if writes is None and order.mode != SAMPLING:
            raise CommandError(
                f"mode {order.mode} is not enabled, use other method instead."
            )
        self._order, self._rate = order, None
        self._idle = trio.Event()
        self._scope = trio.CancelScope()
        self._nursery.start_soon(self._measure, order, writes)
        return None

    async def _query(self, arguments: Mapping[str, Json]) -> Json:
        unit = str(arguments.get("calc-time-unit", "second"))
        order = self._order or _Order(
            milliseconds=0, samples=0, mode=SAMPLING, started=0
        )
        info: dict[str, Json] = {
            "status": self._status,
            "start-time": order.started,
            "calc-time": order.milliseconds // MS[unit],
            "calc-time-unit": unit,
            "sample-pages": order.samples,
            "mode": order.mode,
        }
        return info if self._rate is None else {**info, "dirty-rate": self._rate}

    @property
    def _status(self) -> str:
        if not self._idle.is_set():
            return "measuring"
        return "unstarted" if self._rate is None else "measured"

    # -- measuring

    async def _measure(self, order: _Order, writes: Writes | None) -> None:
        try:
            with self._scope:
                seconds = order.milliseconds / 1000
                if writes is None:
                    self._rate = await self._sample(order.samples, seconds)
                else:
                    self._rate = await self._count(writes, seconds)
        finally:
            self._idle.set()

    async def _count(self, writes: Writes, seconds: float) -> int:
        try:
            writes.start()
            begun = time.monotonic()
            await trio.sleep(seconds)
            pages = writes.sync()
            return int(pages * PAGE / MIB / (time.monotonic() - begun))
        finally:
            writes.stop()

    async def _sample(self, per_gib: int, seconds: float) -> int:
        blocks = self._guest.blocks
        samples = choose(blocks, per_gib, random.Random())
        before = await trio.to_thread.run_sync(_sums, samples)
        begun = time.monotonic()
        await trio.sleep(seconds)
        elapsed = time.monotonic() - begun
        after = await trio.to_thread.run_sync(_sums, samples)
        written = sum(old != new for old, new in zip(before, after, strict=True))
        total = sum(block.length for block in blocks)
        return int(total * written / len(samples) / MIB / elapsed)


Sample = tuple[int, int]  # descriptor, offset


def choose(
    blocks: Sequence[RamBlock], per_gib: int, dice: random.Random
) -> list[Sample]:
    """Different pages, spread over the blocks by their size."""
    total = sum(block.length for block in blocks)
    wanted = max(per_gib * total // GIB, LEAST_PAGES)
    chosen: list[Sample] = []
    for block in blocks:
        pages = block.length // PAGE
        count = min(pages, max(1, wanted * block.length // total))
        numbers = dice.sample(range(pages), count)
        chosen += [(block.fd, block.start + number * PAGE) for number in numbers]
    return chosen


def _sums(samples: Sequence[Sample]) -> list[int]:
    """Reading the file allocates no holes."""
    return [zlib.crc32(os.pread(fd, PAGE, offset)) for fd, offset in samples]


def _order(arguments: Mapping[str, Json]) -> _Order:
    """What the arguments ask for; refused in QEMU's order."""
    unit = str(arguments.get("calc-time-unit", "second"))
    mode = str(arguments.get("mode", SAMPLING))
    milliseconds = int(str(arguments["calc-time"])) * MS[unit]
    if not SHORTEST_MS <= milliseconds <= LONGEST_MS:
        raise CommandError(
            f"Calculation time is out of range [{SHORTEST_MS}ms, {LONGEST_MS}ms]."
        )
    given = arguments.get("sample-pages")
    if given is not None and mode != SAMPLING:
        raise CommandError("sample-pages is used only in page-sampling mode")
    samples = DEFAULT_SAMPLES if given is None else int(str(given))
    if not FEWEST_SAMPLES <= samples <= MOST_SAMPLES:
        raise CommandError(
            f"sample-pages is out of range[{FEWEST_SAMPLES}, {MOST_SAMPLES}]."
        )
    return _Order(
        milliseconds=milliseconds,
        samples=samples,
        mode=mode,
        started=int(time.time()),
    )
