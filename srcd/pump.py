"""Python face of the source's loops: pages out, return path in, dirty bitmaps."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, HostError, StreamError
from common.native._native import ffi, lib
from common.native.loop import check, run_loop
from common.native.ram import Ram
from common.stream import bitmap, command
from common.stream import constants as c

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from common.channel import Channel
    from common.guest.base import Guest, RamBlock
    from common.native import CData

log = logging.getLogger(__name__)

PAGE: Final = c.TARGET_PAGE_SIZE


class Pump:
    """RAM blocks, their bitmaps and the loops that send them.

    Made for one migration. The loops run on the channels of `connect`.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._ram = Ram(blocks)
        self._native = ffi.new("struct source *")
        try:
            check(lib.ram_prepare_source(self._ram.native))
            check(lib.source_open(self._native, self._ram.native, c.RAM_SECTION_ID))
        except HostError:
            self._ram.close()
            raise
        self.total = int(self._ram.native.total)
        """Bytes of RAM."""
        self._main: Channel | None = None
        self._keep: tuple[CData, ...] = ()
        self._owing = False
        self._stored: CData | None = None
        self._checksums: CData | None = None
        self._arriving: CData | None = None
        self._verified = 0
        self._closed = False

    @property
    def ram(self) -> Ram:
        return self._ram

    @property
    def stats(self) -> CData:
        """Counters; they stay when the pump is closed."""
        return self._native.stats

    # -- stored RAM

    def serve_stored(self, checksums: bytes | None, first: Sequence[int]) -> None:
        """The RAM comes from a store; before any loop runs.

        `checksums` of all blocks as they are in memory, if there are any, `first`
        the pages to be sent first, see csrc/working_set.h.
        """
        self._stored = ffi.new("struct stored *")
        self._checksums = (
            ffi.NULL if checksums is None else ffi.from_buffer("uint32_t[]", checksums)
        )
        try:
            check(lib.stored_open(self._stored, self._ram.native, self._checksums))
            check(lib.source_serve(self._native, self._stored))
        except HostError:
            self.close()
            raise
        wanted = ffi.addressof(self._stored, "working_set")
        for page in first:
            lib.working_set_add_untrusted(wanted, self._ram.native, page)
        self._native.section_id = c.PARKED_RAM_SECTION_ID

    def serve_arriving(self, received: int, socket: int, filler: str) -> None:
        """The store is being filled: what is not here has to be waited for.

        `received` is the file that says what is here, `socket` the one to ask for
        pages from at the address `filler`.
        """
        self._arriving = ffi.new("struct arriving *")
        try:
            check(
                lib.arriving_open(
                    self._arriving, self._ram.native, received, socket, filler.encode()
                )
            )
        except HostError:
            self.close()
            raise
        lib.source_await(self._native, self._arriving)

    def send_only_asked(self, seconds: int) -> None:
        """In postcopy, for so long from its beginning; before any loop runs."""
        self._native.only_asked_ns = seconds * 1_000_000_000

    @property
    def arrives(self) -> bool:
        """Whether pages are still to come; once all have, it stays so."""
        return self._arriving is not None

    @property
    def asked_upstream(self) -> int:
        """How often pages were asked for where the VM comes from."""
        return int(self._arriving.asked) if self._arriving is not None else 0

    def leave_out_zeroes(self, yes: bool) -> None:
        """Stored pages of zeroes are sent in postcopy only if they are asked for."""
        if self._stored is not None:
            self._stored.leave_out_zeroes = yes

    @property
    def asked(self) -> Sequence[int]:
        """Stored pages that were asked for, in that order; not once closed."""
        if self._stored is None:
            return ()
        found = self._stored.working_set
        asked: Sequence[int] = ffi.unpack(found.asked, found.asked_count)
        return asked

    @property
    def verified_regions(self) -> int:
        """Regions of stored RAM that were compared with their checksums."""
        if self._stored is not None and not self._closed:
            self._verified = int(lib.stored_verified(self._stored))
        return self._verified

    def _explained(self, error: HostError) -> HostError:
        """Where stored RAM is not what it was."""
        block, offset = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        if self._stored is None or not lib.stored_damage(self._stored, block, offset):
            return error
        damaged = self._blocks()[block[0]]
        file = os.readlink(f"/proc/self/fd/{damaged.fd}")
        wrong = error.errno == errno.EBADMSG  # it could be read
        return HostError(
            f"{file}: RAM block {_name(damaged)}, offset {offset[0]:#x}:"
            f" {'it is not what it was' if wrong else error.message}; restore this"
            " file from a copy",
            errno=None if wrong else error.errno,
        )

    # -- the loops

    @property
    def window_bytes(self) -> int:
        """How much of the background stream may be on its way in postcopy."""
        return int(lib.flow_window(ffi.addressof(self._native, "flow")))

    @property
    def round_trip_ns(self) -> int:
        """To the destination's loader and back, with nothing in between; or 0."""
        return int(lib.flow_base_ns(ffi.addressof(self._native, "flow")))

    def connect(self, main: Channel, preempt: Channel | None) -> None:
        """Use these channels; without `preempt` urgent pages go on main."""
        urgent = preempt or main
        self._main = main
        self._keep = (main.native, urgent.native)
        lib.source_connect(self._native, main.native, urgent.native)

    def use_preempt(self, preempt: Channel) -> None:
        """Urgent pages go there from now on; the loops may run."""
        self._keep = (*self._keep, preempt.native)
        lib.source_use_preempt(self._native, preempt.native)

    def limit(self, bytes_per_second: int) -> None:
        """Bandwidth of pages that nobody asked for; 0 is unlimited."""
        lib.source_limit(self._native, bytes_per_second)

    def cut_short(self, yes: bool) -> None:
        """Leave the running pass as soon as possible, and any later one."""
        lib.source_yield(self._native, yes)

    def dirty_bytes(self) -> int:
        """Still to send in precopy; 0 once closed."""
        return int(lib.source_dirty_pages(self._native)) * PAGE

    def remaining_bytes(self) -> int:
        """Still to send, in the phase it is in; 0 once closed."""
        if not self._owing:
            return self.dirty_bytes()
        return int(lib.source_owed_pages(self._native)) * PAGE

    async def layout(self) -> tuple[bytes, bool]:
        """What RAM looks like, as LAYOUT commands, and: is any chunk full?

        What is empty is clean then. Only once writes are tracked, and only for
        who understands the command. Stored RAM is not told: where it is empty its
        checksum says whether it should be.
        """
        if self._stored is not None:
            return b"", False
        layouts = await trio.to_thread.run_sync(self._layout)
        full = any(lib.CHUNK_FULL in layout.kinds for layout in layouts)
        return b"".join(map(command.encode, layouts)), full

    def _layout(self) -> list[command.Layout]:
        layouts = []
        for block in self._blocks():
            chunks = int(lib.block_chunks(block))
            for first in range(0, chunks, c.MAX_LAYOUT):
                count = min(chunks - first, c.MAX_LAYOUT)
                kinds = ffi.new("uint8_t[]", count)
                lib.layout_look(block, first, kinds, count)
                lib.layout_skip_empty(block, first, kinds, count)
                told = bytes(ffi.buffer(kinds))
                layouts.append(command.Layout(_name(block), first, told))
        return layouts

    def owe_dirty(self) -> None:
        """The guest has stopped: what is dirty is owed from now on."""
        self._owing = True
        lib.source_owe_dirty(self._native)

    @property
    def blocks(self) -> list[str]:
        """The names of the RAM blocks."""
        return [_name(block) for block in self._blocks()]

    def _blocks(self) -> list[CData]:
        ram = self._ram.native
        return [ffi.addressof(ram.blocks, i) for i in range(ram.count)]

    async def owe_missing_untrusted(self, name: str) -> None:
        """Read the received bitmap of a block, behind its message; owe the rest."""
        block = lib.ram_find(self._ram.native, name.encode(), len(name.encode()))
        if block == ffi.NULL:
            raise StreamError("bitmap of a RAM block that is not here", got=name)
        assert self._main is not None

        def owe(read: Callable[[int], bytes]) -> None:
            received = bitmap.read_untrusted(read, block.length // PAGE)
            lib.source_owe_missing(block, received)

        await self._main.decode(owe)

    def will_end(self) -> None:
        """EOF comes next; a peer that closes its preempt channel is right."""
        self._native.ended = 1

    async def precopy_pass(self) -> bool:
        """Send what is dirty; False if it was cut short."""
        return await self._run(lib.pump_precopy)

    async def last_pass(self) -> None:
        """All that is dirty, and nothing less: END comes next."""
        await self._whole(lib.pump_precopy)

    async def discards(self) -> None:
        await self._whole(lib.pump_discards)

    async def postcopy(self) -> None:
        """Send what is owed; returns when nothing is left or in flight."""
        await self._whole(lib.pump_postcopy)

    async def _whole(self, loop: CData) -> None:
        """A loop that was stopped has left pages behind: that must not pass."""
        if not await self._run(loop):
            raise ChannelLost("the channel was shut down", channel="main")

    async def message(self) -> tuple[int, bytes] | None:
        """The next return path message that is no page request; None: stopped."""
        message = ffi.new("struct rp_message *")
        if not await self._run(lambda source: lib.rpath_run(source, message)):
            return None
        payload = bytes(ffi.buffer(message.payload, message.length))
        return message.type, payload

    async def _run(self, loop: Callable[[CData], CData]) -> bool:
        assert self._main is not None
        try:
            return await run_loop(lambda: loop(self._native), self._main.stop)
        except HostError as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Give bitmaps and mappings back; no loop may run any more."""
        if not self._closed:
            _ = self.verified_regions  # it stays known
            self._closed = True
            lib.source_close(self._native)
            if self._stored is not None:
                lib.stored_close(self._stored)
            if self._arriving is not None:
                lib.arriving_close(self._arriving)
            self._ram.close()


def _name(block: CData) -> str:
    name: str = ffi.string(block.idstr).decode()
    return name


class Tracking:
    """Dirty tracking of one migration; `how` names the way, for log and query."""

    def __init__(self, guest: Guest, ram: Ram, *, allowed: bool = True) -> None:
        self._native = ffi.new("struct dirty *")
        self._native.ram = ram.native
        self._native.way = _choose_way(guest, allowed=allowed)
        self._native.uffd = -1 if guest.userfaultfd is None else guest.userfaultfd
        self._native.pagemap = -1 if guest.pagemap is None else guest.pagemap
        self._pages = ffi.new("uint64_t *")
        log.info("dirty tracking: %s", self.how)

    @property
    def how(self) -> str:
        return _WAYS[int(self._native.way)]

    @property
    def able(self) -> bool:
        """Whether writes are told from what was not written."""
        return int(self._native.way) != int(lib.DIRTY_UNKNOWN)

    def start(self) -> None:
        """Everything is dirty, and from here on every write is seen."""
        check(lib.dirty_start(self._native))

    def sync(self) -> int:
        """Collect what was written; the number of target pages.

        Not a loop: less than 1 ms per GiB of idle guest, 23 ms at the worst.
        """
        check(lib.dirty_sync(self._native, self._pages))
        return int(self._pages[0])

    def sync_last(self) -> None:
        """The same when the guest has stopped, and waits for it."""
        check(lib.dirty_sync_last(self._native, self._pages))

    def stop(self) -> None:
        check(lib.dirty_stop(self._native))


def _choose_way(guest: Guest, *, allowed: bool) -> int:
    """What this kernel and this guest's process make possible."""
    if not guest.vcpus and guest.userfaultfd is None and not guest.no_userfaultfd:
        return int(lib.DIRTY_NEVER)
    able = guest.abilities & lib.UFFD_CAN_WP_ASYNC
    if allowed and able and guest.pagemap is not None:
        return int(lib.DIRTY_WP_ASYNC)
    return int(lib.DIRTY_UNKNOWN)


_WAYS: Final = {
    lib.DIRTY_NEVER: "none needed: nobody writes this RAM",
    lib.DIRTY_UNKNOWN: "none: every page counts as dirty in every pass",
    lib.DIRTY_WP_ASYNC: "userfaultfd write protection with PAGEMAP_SCAN",
}
