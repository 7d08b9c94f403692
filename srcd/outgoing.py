"""OutgoingMigration: set-up, precopy, switchover, postcopy, end; top to bottom.

The guest belongs to the source until the destination has proven that it has
loaded the device state. Before that every failure leaves the guest running
here. After that none does: the status becomes postcopy-paused.

With a destination that is dstd the proof is closed on both sides (COMMIT, see
docs/wire-format.md), so exactly one side ever runs the guest. A QEMU
destination runs it right after the proof, PONG 3, has left.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

import trio

from common.address import Exec, File
from common.channel import Channel, connect
from common.errors import (
    ChannelLost,
    GuestError,
    MigrationError,
    Refused,
    StreamError,
    cause_of,
)
from common.guest.base import GuestState
from common.native._native import lib
from common.status import MigrationStatus as M
from common.stream import command, fields, returnpath, section, vmdesc
from common.stream import constants as c
from common.stream.package import Package, encode_package
from srcd.pump import Pump, Tracking

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common import status as statuses
    from common.address import Address
    from common.guest.base import Guest
    from common.qmp.message import Json
    from common.settings import Settings

log = logging.getLogger(__name__)

# When a channel breaks, how long the peer's own words may take to be read.
LAST_WORDS_SECONDS: Final = 2.0
# A pass that leaves nearly as much to send as it found, so often in a row: no
# hope.
HOPELESS_PASSES: Final = 3
HOPELESS_SHARE: Final = 0.9
PAGE: Final = c.TARGET_PAGE_SIZE


class Ending(Enum):
    """How precopy came to its end."""

    CONVERGED = "what is left fits the downtime limit"
    POSTCOPY = "postcopy was asked for"


@dataclass(slots=True)
class Times:
    """Moments of one migration, in seconds of the monotonic clock; 0 is never."""

    begun: float = 0.0
    active: float = 0.0
    stopped: float = 0.0
    handed_over: float = 0.0
    ended: float = 0.0
    marks: list[tuple[str, float]] = field(default_factory=list)

    def mark(self, part: str) -> None:
        """A part of the downtime is over."""
        self.marks.append((part, time.monotonic()))

    def downtime_parts_ms(self) -> dict[str, float]:
        """What the downtime was spent on, in order."""
        parts = {}
        before = self.stopped
        for part, moment in self.marks:
            parts[part] = round((moment - before) * 1000, 3)
            before = moment
        return parts


@dataclass(slots=True)
class Sent:
    """Bytes on all channels at the borders between the phases."""

    precopy: int = 0
    downtime: int = 0


@dataclass(slots=True)
class Pass:
    """What is known from the last full pass over the dirty bitmap."""

    number: int = 0
    dirty_pages_per_second: int = 0
    bytes_per_second: float = 0.0
    expected_downtime_ms: int | None = None
    growing: int = 0


class OutgoingMigration:
    """One migration of `guest` to one destination.

    `emit` sends a QMP event; `run_state` is told when the guest stops and runs
    for the migration's reasons. `preempt_early` is for a destination that is QEMU 7.
    """

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: statuses.StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        *,
        track: bool = True,
        preempt_early: bool = False,
    ) -> None:
        self.guest = guest
        self.settings = settings
        self.status = status
        self.error: MigrationError | None = None
        self.times = Times(begun=time.monotonic())
        self.sent = Sent()
        self._bytes_before = 0  # on channels that are closed
        self.last_pass = Pass()
        self.pump: Pump | None = None
        self.tracking: Tracking | None = None
        self._track = track
        self._preempt_early = preempt_early
        self._emit = emit
        self._run_state = run_state
        self._main: Channel | None = None
        self._preempt: Channel | None = None
        self._scope = trio.CancelScope()
        self._postcopy_asked = False
        self._cancel_asked = False
        self._was_running = guest.state is GuestState.RUNNING
        self._return_path = False
        self._given_up = False  # the guest is the destination's
        self._packaged = False
        self.peer_is_dstd = False
        self._pongs: set[int] = set()
        self._news = trio.Condition()
        self._shut = False
        self._reason = ""
        self._listening = trio.Event()  # set when the return path has ended

    # -- orders from outside

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as the stream is active."""
        self._postcopy_asked = True
        if self.pump:
            self.pump.cut_short(True)

    @property
    def cancellable(self) -> bool:
        """Until the destination may have got the guest."""
        return not self._packaged and not self._given_up

    def cancel(self) -> None:
        """End it; the guest goes on here. Only while `cancellable`."""
        self._cancel_asked = True
        self._scope.cancel()
        for channel in (self._main, self._preempt):
            if channel:
                channel.shutdown()

    def apply_limits(self) -> None:
        """Bandwidth parameters have changed."""
        if self.pump:
            postcopy = self._packaged
            name = "max-postcopy-bandwidth" if postcopy else "max-bandwidth"
            self.pump.limit(self.settings.number(name))

    # -- the whole

    async def run(self, address: Address) -> None:
        """Migrate; never raises a MigrationError, the status tells."""
        try:
            with self._scope:
                await self._migrate(address)
            if self._scope.cancelled_caught:
                await self._cancelled()
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            # Breaking the channels makes the loops on them fail.
            await (self._cancelled() if self._cancel_asked else self._failed(cause))
        finally:
            self._release()

    async def _migrate(self, address: Address) -> None:
        self._main = await connect(address, "main")
        self._return_path = not isinstance(address, File | Exec)
        if self._preempt_early:
            # QEMU 7 reads nothing from main before it has both, and tells them
            # apart by their order.
            await self._connect_preempt(address)
        self.pump = Pump(self.guest.blocks)
        self.tracking = self._choose_tracking(self.pump)
        self.apply_limits()
        async with trio.open_nursery() as nursery:
            if self._return_path:
                nursery.start_soon(self._read_return_path)
            else:
                self._listening.set()
            self.pump.connect(self._main, None)
            try:
                await self._phases(address, nursery)
            except BaseException as error:
                # The peer may have said why before it closed; that tells more.
                if isinstance(cause_of(error), ChannelLost):
                    with trio.move_on_after(LAST_WORDS_SECONDS):
                        await self._listening.wait()
                raise
        self._run_state("postmigrate")
        self._end(M.COMPLETED)

    async def _phases(self, address: Address, nursery: trio.Nursery) -> None:
        await self._set_up()
        ending = await self._precopy()
        if ending is Ending.POSTCOPY:
            await self._postcopy(address, nursery)
        else:
            await self._complete_precopy()

    # -- set-up

    async def _set_up(self) -> None:
        """Everything that the destination can refuse before the guest stops."""
        assert self._main is not None
        assert self.pump is not None
        assert self.tracking is not None
        head = [
            section.FILE_HEADER,
            section.encode_configuration(
                section.Configuration(machine=self.guest.machine)
            ),
        ]
        if self._return_path:
            head += [
                command.encode(command.OpenReturnPath()),
                command.encode(command.Ping(c.PING_FIRST)),
                command.encode(command.Ping(c.PING_HELLO)),
            ]
        if self._advises:
            sizes = 0
            for block in self.guest.blocks:
                sizes |= block.page_size
            head.append(command.encode(command.Advise(sizes, PAGE)))
            if self.settings.on("postcopy-preempt"):
                head.append(command.encode(command.Ping(c.PING_PREEMPT)))
        head.append(section.encode_section(section.RAM_START, self._block_list()))
        await self._main.write(b"".join(head))
        if self._return_path:
            await self._taken()
        self.tracking.start()
        self.times.active = time.monotonic()
        self._next_pass()
        self.status.set(M.ACTIVE)

    @property
    def _advises(self) -> bool:
        return self._return_path and self.settings.on("postcopy-ram")

    def _block_list(self) -> bytes:
        return section.encode_ram_setup(
            [
                section.BlockEntry(
                    idstr=block.idstr,
                    length=block.length,
                    page_size=section.listed_page_size(block.page_size)
                    if self._advises
                    else None,
                )
                for block in self.guest.blocks
            ]
        )

    def _choose_tracking(self, pump: Pump) -> Tracking:
        guest = self.guest
        way = lib.DIRTY_UNKNOWN
        if not guest.vcpus and guest.userfaultfd is None and not guest.no_userfaultfd:
            way = lib.DIRTY_NEVER
        elif self._can_track:
            way = lib.DIRTY_WP_ASYNC
        tracking = Tracking(
            pump.ram,
            way=way,
            uffd=-1 if guest.userfaultfd is None else guest.userfaultfd,
            pagemap=-1 if guest.pagemap is None else guest.pagemap,
        )
        log.info("dirty tracking: %s", tracking.how)
        return tracking

    @property
    def _can_track(self) -> bool:
        able = self.guest.abilities & lib.UFFD_CAN_WP_ASYNC
        return bool(self._track and able and self.guest.pagemap is not None)

    # -- precopy

    async def _precopy(self) -> Ending:
        """Passes over the dirty bitmap until the rest is small, or orders come."""
        assert self.pump is not None
        while True:
            found = self.pump.dirty_bytes()
            begun = time.monotonic()
            before = self.bytes_sent
            finished = self._postcopy_ready or await self.pump.precopy_pass()
            if self._postcopy_ready:
                return Ending.POSTCOPY
            if not finished:
                await trio.lowlevel.checkpoint()
                continue
            seconds = max(time.monotonic() - begun, 1e-6)
            self._measure(found, self.bytes_sent - before, seconds)
            if self._fits():
                return Ending.CONVERGED
            self._next_pass()
            await trio.lowlevel.checkpoint()

    @property
    def _postcopy_ready(self) -> bool:
        return self._postcopy_asked and self._advises

    def _next_pass(self) -> None:
        self.last_pass.number += 1
        self._emit("MIGRATION_PASS", {"pass": self.last_pass.number})

    def _measure(self, found: int, sent: int, seconds: float) -> None:
        """After a pass: what is dirty now, and how long would sending it take?"""
        assert self.pump is not None
        assert self.tracking is not None
        pages = self.tracking.sync()
        assumed = self.settings.number("avail-switchover-bandwidth")
        rate = float(assumed) if assumed else max(sent, 1) / seconds
        left = self.pump.dirty_bytes()
        self.last_pass.dirty_pages_per_second = int(pages / seconds)
        self.last_pass.bytes_per_second = rate
        self.last_pass.expected_downtime_ms = int(1000 * left / rate)
        growing = self.last_pass.growing
        stuck = left > HOPELESS_SHARE * found
        self.last_pass.growing = growing + 1 if stuck else 0

    def _fits(self) -> bool:
        expected = self.last_pass.expected_downtime_ms
        return expected is not None and expected <= self.settings.number(
            "downtime-limit"
        )

    @property
    def converging(self) -> bool:
        """False once several passes left about as much to send as they found."""
        return self.last_pass.growing < HOPELESS_PASSES

    # -- switchover

    async def _stop_guest(self) -> None:
        assert self.pump is not None
        assert self.tracking is not None
        self.sent.precopy = self.bytes_sent
        self.times.stopped = time.monotonic()
        if self._was_running:
            await self.guest.stop()
        self._run_state("finish-migrate")
        if self._was_running:
            self._emit("STOP", None)
        self.status.set(M.DEVICE)
        self.times.mark("stop")
        self.tracking.sync()
        self.times.mark("sync")
        self.last_pass.number += 1
        self._emit("MIGRATION_PASS", {"pass": self.last_pass.number})

    async def _device_sections(self) -> tuple[bytes, tuple[vmdesc.Device, ...]]:
        """The FULL sections, and what the description says about them."""
        sections: list[bytes] = []
        described: list[vmdesc.Device] = []
        if (device := self.guest.device) is not None:
            state = await self.guest.save()
            sections.append(
                section.encode_section(
                    section.Full(
                        section_id=c.DEVICE_SECTION_ID,
                        name=device.name,
                        instance=0,
                        version=device.version,
                    ),
                    section.encode_device_state(state),
                )
            )
            described.append(
                vmdesc.device_state(device.name, device.version, len(state))
            )
        run_state = "running" if self._was_running else "paused"
        sections.append(
            section.encode_section(
                section.Full(
                    section_id=c.GLOBALSTATE_SECTION_ID,
                    name=c.GLOBALSTATE_SECTION,
                    instance=0,
                    version=c.GLOBALSTATE_SECTION_VERSION,
                ),
                section.encode_globalstate(section.GlobalState(run_state)),
            )
        )
        described.append(vmdesc.GLOBALSTATE)
        return b"".join(sections), tuple(described)

    async def _complete_precopy(self) -> None:
        assert self.pump is not None
        assert self._main is not None
        await self._stop_guest()
        self.pump.limit(0)
        await self.pump.precopy_pass()
        self.times.mark("pages")
        sections, described = await self._device_sections()
        end = section.encode_section(
            section.End(section_id=c.RAM_SECTION_ID), fields.be64(c.RAM_SAVE_FLAG_EOS)
        )
        description = vmdesc.encode(vmdesc.describe(described))
        self.times.mark("save")
        await self._main.write(end + sections + section.EOF + description)
        self.times.mark("send")
        if self._return_path:
            if self.peer_is_dstd:
                await self._pong(c.PING_LOADED)
                await self._commit()
            await self._shut_down()
        else:
            await self._main.finish()
        self._handed_over()

    def _handed_over(self) -> None:
        """The destination has the guest: the end of the downtime."""
        self.times.handed_over = time.monotonic()
        self.times.mark("load")
        self.sent.downtime = self.bytes_sent - self.sent.precopy
        log.info("downtime parts in ms: %s", self.times.downtime_parts_ms())

    async def _commit(self) -> None:
        """Give the guest up for good; dstd runs it only when it has read this."""
        assert self._main is not None
        self._given_up = True
        await self._main.write(command.encode(command.Ping(c.PING_COMMIT)))

    # -- postcopy

    async def _postcopy(self, address: Address, nursery: trio.Nursery) -> None:
        assert self.pump is not None
        assert self._main is not None
        if not self._preempt_early:
            # Not before a PONG: else the destination may take it for main.
            await self._connect_preempt(address)
            await self._check_preempt()
        self.pump.cut_short(False)
        await self._stop_guest()
        await self._send_package()
        async with trio.open_nursery() as pumping:
            pumping.start_soon(self._pump_pages)
            await self._pong(c.PING_LOADED)
            if self.peer_is_dstd:
                await self._commit()
            self._given_up = True
            self._handed_over()
            self.status.set(M.POSTCOPY_ACTIVE)
        await self._end_postcopy()

    async def _connect_preempt(self, address: Address) -> None:
        assert self._main is not None
        if self.settings.on("postcopy-preempt"):
            self._preempt = await connect(address, "preempt", self._main.stop)

    async def _check_preempt(self) -> None:
        """A destination that has the capability off has closed it by now."""
        if self._preempt is None:
            return
        await self._taken()
        if self._preempt.hung_up():
            raise ChannelLost(
                "the destination has closed the preempt channel; switch"
                " postcopy-preempt on on both sides or on neither",
                channel="preempt",
            )

    async def _send_package(self) -> None:
        assert self.pump is not None
        assert self._main is not None
        self.pump.connect(self._main, self._preempt)
        self.pump.owe_dirty()
        await self.pump.discards()
        self.times.mark("discard")
        sections, _ = await self._device_sections()
        self.times.mark("save")
        package = encode_package(Package(sections=sections))
        self._packaged = True
        self.apply_limits()
        await self._main.write(
            command.encode(command.Ping(c.PING_DISCARDED))
            + command.encode(command.Packaged(len(package)))
            + package
            + command.encode(command.Ping(c.PING_LISTENING))
        )
        self.times.mark("send")

    async def _pump_pages(self) -> None:
        assert self.pump is not None
        await self.pump.postcopy()

    async def _end_postcopy(self) -> None:
        assert self.pump is not None
        assert self._main is not None
        self.pump.will_end()
        eos = fields.be64(c.RAM_SAVE_FLAG_EOS)
        end = section.encode_section(section.End(section_id=c.RAM_SECTION_ID), eos)
        await self._main.write(end + section.EOF)
        if self._preempt and self._preempt_early:
            await self._preempt.write(eos)  # QEMU 7 waits for it
        await self._shut_down()

    # -- the return path

    async def _read_return_path(self) -> None:
        """Page requests are answered in C; this sees everything else."""
        assert self.pump is not None
        try:
            while not self._shut:
                message = await self.pump.message()
                if message is None:
                    return
                await self._take(_decode_untrusted(*message))
        finally:
            self._listening.set()

    async def _take(self, message: returnpath.Message) -> None:
        async with self._news:
            match message:
                case returnpath.Pong(c.PONG_HELLO_ACK):
                    self.peer_is_dstd = True
                case returnpath.Pong(value):
                    self._pongs.add(value)
                case returnpath.Failure(text):
                    self._reason = text
                case returnpath.Shut(0):
                    self._shut = True
                case returnpath.Shut():
                    raise Refused(self._reason)
                case returnpath.SwitchoverAck():
                    pass
                case _:
                    raise StreamError("unexpected return path message", got=message)
            self._news.notify_all()

    async def _pong(self, value: int) -> None:
        async with self._news:
            while value not in self._pongs:
                await self._news.wait()

    async def _taken(self) -> None:
        """Wait until the destination has taken all that was sent so far."""
        assert self._main is not None
        self._pongs.discard(c.PING_SETUP)
        await self._main.write(command.encode(command.Ping(c.PING_SETUP)))
        await self._pong(c.PING_SETUP)

    async def _shut_down(self) -> None:
        async with self._news:
            while not self._shut:
                await self._news.wait()

    # -- the ends

    async def _failed(self, error: MigrationError) -> None:
        log.warning("migration failed: %s", error)
        self.error = error
        if self._packaged and self._given_up:
            self.status.set(M.POSTCOPY_PAUSED)
            return
        if self._given_up:
            self.error = ChannelLost(
                f"{error}; the destination was told to run the guest: see whether it"
                " does before you continue it here"
            )
            self._run_state("paused")
        else:
            await self._take_guest_back()
        self._end(M.FAILED)

    async def _cancelled(self) -> None:
        await self._take_guest_back()
        self._end(M.CANCELLED)

    def _end(self, status: M) -> None:
        self.times.ended = time.monotonic()
        self.status.set(status)

    async def _take_guest_back(self) -> None:
        """The guest goes on here as it was before the migration."""
        if not self.times.stopped:
            return
        if not self._was_running:
            self._run_state("paused")
            return
        try:
            await self.guest.cont()
        except GuestError as error:
            log.error("the guest cannot go on here: %s", error)
            self._run_state("internal-error")
            return
        self._run_state("running")
        self._emit("RESUME", None)

    def _release(self) -> None:
        """All loops have ended; a paused postcopy keeps its bitmaps."""
        if self.tracking and self.status.now is not M.POSTCOPY_PAUSED:
            self.tracking.stop()
        for channel in (self._preempt, self._main):
            if channel:
                self._bytes_before += channel.sent
                channel.close()
        self._preempt = self._main = None

    # -- figures

    @property
    def bytes_sent(self) -> int:
        """On all channels; stays known when they are closed."""
        open_now = (ch for ch in (self._main, self._preempt) if ch)
        return self._bytes_before + sum(channel.sent for channel in open_now)


def _decode_untrusted(kind: int, payload: bytes) -> returnpath.Message:
    """The codec reads from the wire's first byte on; the C loop took the head."""
    head = fields.be16(kind) + fields.be16(len(payload))
    return returnpath.read_untrusted(fields.over(head + payload))
