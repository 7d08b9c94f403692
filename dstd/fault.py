"""Python face of the destination's loops: faults, and pages on both channels."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Final

import trio

from common.errors import HostError, StreamError
from common.guest.keeping import check_kept
from common.native._native import ffi, lib
from common.native.loop import Stop, check, run_loop
from common.native.ram import Ram
from common.native.stats import histogram
from common.stream import bitmap
from common.stream.constants import LAYOUT_CHUNK, TARGET_PAGE_SIZE
from dstd.record import RECEIVED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from common.channel import Channel
    from common.guest.base import Guest
    from common.native import CData
    from common.stream.command import Layout

NS_PER_MS: Final = 1_000_000
# QEMU's postcopy-latency-dist: bucket N counts 2^N to 2^(N+1) microseconds.
LATENCY_BUCKETS: Final = 24

# In csrc/wait.h, in the order in which they happen.
_PHASES: Final = ("request", "reply", "place", "wake")

_WAYS: Final = {
    int(lib.PLACE_FILE): "file",
    int(lib.PLACE_CONTINUE): "continue",
    int(lib.PLACE_COPY): "copy",
}


def choose_way(guest: Guest, *, copy: bool = False) -> int:
    """How pages get into this guest; `copy` forces the fall-back of old kernels."""
    if guest.userfaultfd is None:
        return int(lib.PLACE_FILE)
    if copy or not guest.abilities & lib.UFFD_CAN_MINOR:
        return int(lib.PLACE_COPY)
    return int(lib.PLACE_CONTINUE)


class Memory:
    """The guest's RAM while it arrives: what is here, what is asked for.

    `left` is the file in which a daemon before us noted what is here.
    """

    def __init__(self, guest: Guest, way: int, left: int | None = None) -> None:
        self._ram = Ram(guest.blocks)
        self.kept = -1
        self._native = ffi.new("struct destination *")
        vcpus = ffi.new("uint32_t[]", list(guest.vcpus))
        uffd = -1 if guest.userfaultfd is None else guest.userfaultfd
        try:
            if guest.blocks:
                self._note_in(guest, left)
            check(
                lib.destination_open(
                    self._native, self._ram.native, way, uffd, vcpus, len(guest.vcpus)
                )
            )
        except HostError:
            self._ram.close()
            raise
        self._stop = Stop()
        self._sweep_stop = Stop()
        self._upstream_stop = Stop()
        self._prepare_stop = Stop()
        self.way = way
        self._channel: CData = None

    def adopt(self, guest: Guest) -> None:
        """The guest's blocks are known now; what they are of is not."""
        self._ram.open(guest.blocks)
        self._native.unsent_is_hole = 1
        self._note_in(guest, None)

    def _note_in(self, guest: Guest, left: int | None) -> None:
        """What is here is noted in a file that can be kept over our death."""
        length = int(lib.ram_kept_length(self._ram.native))
        if left is None:
            self.kept = guest.make_kept(RECEIVED, length)
        else:
            check_kept(left, length)
            self.kept = os.dup(left)
        check(lib.ram_prepare_destination(self._ram.native, self.kept))

    @property
    def way_name(self) -> str:
        return _WAYS[self.way]

    @property
    def native(self) -> CData:
        return self._native

    @property
    def stats(self) -> CData:
        return self._native.stats

    @property
    def total(self) -> int:
        """Bytes of RAM."""
        return int(self._ram.native.total)

    @property
    def missing(self) -> int:
        """Host pages that are not here; counted from `listen` on."""
        return int(lib.destination_missing(self._native))

    def empty(self) -> None:
        """All RAM reads as zero afterwards."""
        check(lib.destination_empty(self._native))

    def expect_untrusted(self, layout: Layout) -> None:
        """What the source says of its RAM; StreamError if that cannot be."""
        block = self._find_untrusted(layout.block)
        check(
            lib.prepare_expect_untrusted(
                self._native, block, layout.first, layout.kinds, len(layout.kinds)
            )
        )

    async def prepare(self) -> None:
        """Allocate what is expected, as huge pages where the kernel can."""
        await run_loop(
            lambda: lib.prepare_run(self._native, self._prepare_stop.fd),
            self._prepare_stop,
        )

    @property
    def prepared_bytes(self) -> int:
        blocks = (self._ram.native.blocks[i] for i in range(self._ram.native.count))
        chunks = sum(lib.bitmap_count(ffi.addressof(b, "prepared")) for b in blocks)
        return int(chunks) * LAYOUT_CHUNK

    def probe(self) -> None:
        """HostError unless the guest's RAM can be registered for faults."""
        check(lib.destination_probe(self._native))

    def connect(self, channel: Channel | None) -> None:
        """Send page requests there; None: the connection is gone."""
        self._channel = channel.native if channel else None
        lib.rpath_connect(
            ffi.addressof(self._native, "rpath"), self._channel or ffi.NULL
        )

    def listen(self) -> None:
        """From here on missing pages make the guest wait."""
        check(lib.destination_listen(self._native))

    def begin_epoch(self) -> None:
        """The connection is gone: what was on its way is missing again."""
        check(lib.destination_begin_epoch(self._native))

    def wake(self) -> None:
        """Whoever waits for a page faults again: the fault loop starts anew."""
        check(lib.destination_wake(self._native))

    async def ask_again(self, channel: Channel) -> None:
        """Ask for all that was asked for and is missing, on a new connection."""
        await run_loop(lambda: lib.fault_ask_again(self._native), channel.stop)

    def received_untrusted(self, name: str) -> bytes:
        """The received bitmap of a block, as a recovery sends it."""
        block = self._find_untrusted(name)
        pages = int(block.length) // TARGET_PAGE_SIZE
        bits = ffi.buffer(block.received.words, bitmap.size_of(pages))
        return bitmap.encode(bytes(bits), pages)

    def _find_untrusted(self, name: str) -> CData:
        block = lib.ram_find(self._ram.native, name.encode(), len(name.encode()))
        if block == ffi.NULL:
            raise StreamError("a RAM block that is not here", got=name)
        return block

    async def faults(self) -> None:
        """Answer the guest's faults until cancelled."""
        if self.way != lib.PLACE_FILE:
            await run_loop(
                lambda: lib.fault_run(self._native, self._stop.fd), self._stop
            )

    async def pass_on(self, socket: int) -> None:
        """Ask for the pages that are asked for at `socket`, until cancelled."""
        self._upstream_stop.clear()
        await run_loop(
            lambda: lib.upstream_answer(self._native, socket, self._upstream_stop.fd),
            self._upstream_stop,
        )

    async def sweep(self) -> None:
        """Map what came in precopy, so that the guest does not fault on it."""
        self._sweep_stop.clear()
        await run_loop(
            lambda: lib.place_sweep(self._native, self._sweep_stop.fd),
            self._sweep_stop,
        )

    async def complete(self) -> None:
        """Wait until nothing is missing."""
        await trio.lowlevel.wait_readable(self._native.complete_fd)

    def finish(self) -> None:
        """All is here: the kernel handles the guest's faults again."""
        check(lib.destination_finish(self._native))

    # -- figures

    @property
    def requests(self) -> int:
        return int(self._native.rpath.requests)

    def blocktime_ms(self) -> int:
        """Time in which every vCPU waited for a page."""
        return int(self._native.waiting.all_blocked_ns) // NS_PER_MS

    def vcpu_blocktimes_ms(self) -> list[int]:
        return [int(vcpu.blocked_ns) // NS_PER_MS for vcpu in self._vcpus()]

    def vcpu_latencies_ns(self) -> list[int]:
        """Mean wait of each vCPU for a page."""
        return [_mean(vcpu.blocked_ns, vcpu.faults) for vcpu in self._vcpus()]

    def other_latency_ns(self) -> int:
        """Mean wait of threads that are no vCPUs."""
        waiting = self._native.waiting
        return _mean(waiting.other_ns, waiting.other_faults)

    def latency_ns(self) -> int:
        latency = self._native.waiting.latency
        return _mean(latency.sum_ns, latency.count)

    def latency_distribution(self) -> list[int]:
        edges = [0, *(1 << n for n in range(1, LATENCY_BUCKETS)), 1 << 50]
        histogram = self._histogram
        return [
            int(lib.histogram_between_us(histogram, low, high))
            for low, high in itertools.pairwise(edges)
        ]

    def latency(self) -> Mapping[str, int]:
        """Of every wait for a page, from its event to its end."""
        return histogram(self._histogram)

    def latency_phases(self) -> Mapping[str, Mapping[str, int]]:
        """The parts of those that ended with the page that was asked for."""
        waiting = self._native.waiting
        return {name: histogram(ffi.addressof(waiting, name)) for name in _PHASES}

    @property
    def _histogram(self) -> CData:
        return ffi.addressof(self._native.waiting, "latency")

    def _vcpus(self) -> Sequence[CData]:
        waiting = self._native.waiting
        return [waiting.vcpus[i] for i in range(waiting.vcpu_count)]

    def close(self) -> None:
        """No loop may run any more."""
        lib.destination_close(self._native)
        self._ram.close()
        if self.kept >= 0:
            os.close(self.kept)
        self._stop.close()
        self._sweep_stop.close()
        self._upstream_stop.close()
        self._prepare_stop.close()


def _mean(total: int, count: int) -> int:
    return int(total) // int(count) if count else 0


class Loader:
    """Takes RAM records from one channel and places their pages."""

    def __init__(self, memory: Memory, channel: Channel, *, preempt: bool) -> None:
        self._channel = channel
        self._memory = memory
        self._native = ffi.new("struct loader *")
        check(lib.loader_open(self._native, memory.native, channel.native, preempt))

    def begin(self, section_id: int) -> None:
        """The RAM section has started under this id."""
        self._native.section_id = section_id

    @property
    def section_id(self) -> int:
        return int(self._native.section_id)

    def advise(self) -> None:
        """Discards are legal from here on."""
        self._native.advised = 1

    @property
    def discards(self) -> int:
        return int(self._native.discards)

    @property
    def begun(self) -> bool:
        """The RAM section's first part has been read."""
        return bool(self._native.begun)

    @property
    def ended(self) -> bool:
        """The RAM section's END has been read."""
        return bool(self._native.ended)

    async def sections(self) -> int | None:
        """Load RAM until something else comes; its type byte. None: stopped."""
        if not await run_loop(lambda: lib.load_main(self._native), self._channel.stop):
            return None
        return int(self._native.next)

    async def urgent_pages(self) -> bool:
        """Load the preempt channel; True: the source said that this was all."""
        return await run_loop(
            lambda: lib.load_preempt(self._native), self._channel.stop
        )

    def close(self) -> None:
        lib.loader_close(self._native)
