"""The stream on main, read from top to bottom: header, RAM, devices, EOF.

RAM goes through C loops; what is read here is a dozen records per migration.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from common.errors import ChannelLost, StreamError
from common.status import PostcopyState as P
from common.stream import command, fields, section, vmdesc
from common.stream import constants as c
from common.stream.package import split_package_untrusted
from dstd.ending import receive_early_untrusted, receive_ending_untrusted
from dstd.preparation import Preparation

if TYPE_CHECKING:
    from dstd.admission import Admission
    from dstd.arrival import Arrival
    from dstd.connection import Connection
    from dstd.parking import Parking
    from dstd.postcopy import Postcopy


class Reception:
    """What the source of `link` sends; `head` first, unless it resumes.

    StreamError if that is no stream, or not one of this guest.
    """

    def __init__(
        self, arrival: Arrival, admission: Admission, link: Connection
    ) -> None:
        self._arrival = arrival
        self._admission = admission
        self._link = link
        self._preparation = Preparation(arrival.memory)

    # -- before RAM

    async def head(self) -> None:
        """All in front of the first page; what cannot come in is refused."""
        kind = await self._link.main.decode(self._admission.head_untrusted)
        while kind != c.QEMU_VM_SECTION_START:
            kind = await self._before_ram(kind)
        await self._ram_setup()

    async def _before_ram(self, kind: int) -> int:
        """One record in front of RAM's START; the type byte of the next."""
        if kind != c.QEMU_VM_COMMAND:
            self._admission.settle()
            raise StreamError("unexpected in front of the RAM section", got=kind)
        found = await self._link.peer.command()
        if not isinstance(found, command.OpenReturnPath | command.Ping):
            self._admission.settle()
        await self._command(found)
        return await self._link.peer.next_kind()

    async def _command(self, found: command.Command) -> None:
        """A command that may come outside of the package."""
        arrival, link = self._arrival, self._link
        match found:
            case command.OpenReturnPath():
                link.peer.return_path = True
            case command.Ping(value):
                await link.peer.ping(value)
                arrival.note_migration(link.peer)
            case command.Advise(page_sizes, target_page) if arrival.postcopy.may(
                P.ADVISE
            ):
                self._admission.check_advise(page_sizes, target_page)
                arrival.postcopy.set(P.ADVISE)
                link.loader.advise()
            case command.SwitchoverStart():
                pass
            case command.AdviseEmpty() if arrival.parking:
                pass  # capability dirty-bitmaps; it matters if there are any
            case command.Layout() if link.peer.is_srcd:
                if not arrival.parking:
                    arrival.memory.expect_untrusted(found)
            case _:
                raise StreamError("command that does not belong here", got=found)

    async def _ram_setup(self) -> None:
        """RAM's START: the last that the source says before there are pages."""
        admission, link = self._admission, self._link
        admission.settle()
        advised = self._arrival.postcopy.now is P.ADVISE
        if link.peer.is_srcd and advised:
            admission.check_preempt(at_source=link.peer.preempts)
        start = await self._start()
        blocks = await link.main.decode(
            lambda read: admission.block_list_untrusted(read, advised=advised)
        )
        await link.main.decode(
            lambda read: section.read_footer_untrusted(read, start.section_id)
        )
        admission.check_blocks(blocks)
        if parking := self._arrival.parking:
            await parking.guest.adopt(admission.configuration, blocks, advised=advised)
            self._arrival.memory.adopt(parking.guest)
        # Not before: a source that is refused must not cost us what we hold.
        await trio.to_thread.run_sync(self._arrival.memory.empty)
        link.loader.begin(start.section_id)

    async def _start(self) -> section.Header:
        """What is begun behind this type byte: RAM, or it is refused."""
        start = await self._link.main.decode(
            lambda read: section.read_header_untrusted(read, c.QEMU_VM_SECTION_START)
        )
        self._admission.check_start(start)
        return start

    # -- from the first page on

    async def sections(self, postcopy: Postcopy, nursery: trio.Nursery) -> None:
        """The stream from the first page to its end.

        What it sets going in `nursery` ends with the connection.
        """
        while (kind := await self._next_section()) != c.QEMU_VM_EOF:
            match kind:
                case c.QEMU_VM_COMMAND:
                    await self._between_sections(postcopy, nursery)
                case c.QEMU_VM_SECTION_FULL:
                    if await self._device_state():
                        return
                case c.QEMU_VM_SECTION_START:
                    await self._start()
                    raise StreamError("RAM is started a second time")
                case _:
                    raise StreamError("unexpected section type", got=kind)
        await self._end()

    async def _next_section(self) -> int:
        """The type of what is no RAM; it has been read."""
        kind = await self._link.loader.sections()
        if kind is None:
            raise ChannelLost("the channel was shut down", channel="main")
        await self._link.peer.next_kind()
        return kind

    async def _between_sections(
        self, postcopy: Postcopy, nursery: trio.Nursery
    ) -> None:
        found = await self._link.peer.command()
        if isinstance(found, command.Packaged):
            await self._package(found.size, postcopy, nursery)
        elif found == command.Ping(c.PING_PREPARED):
            nursery.start_soon(self._preparation.run, self._link.peer)
        elif found == command.Ping(c.PING_SETUP):
            await self._preparation.end()
            await self._command(found)
        else:
            await self._command(found)

    async def _package(
        self, size: int, postcopy: Postcopy, nursery: trio.Nursery
    ) -> None:
        """The device state in one piece: postcopy begins."""
        if self._arrival.postcopy.now is not P.ADVISE:
            raise StreamError("a package without ADVISE, or a second one")
        blob = await self._link.main.decode(
            lambda read: fields.take_untrusted(read, size)
        )
        package = split_package_untrusted(blob)
        if not package.listen or not package.run:
            raise StreamError("a package without LISTEN first and RUN last")
        await self._link.preempt_needed()
        await self._preparation.end()
        await postcopy.begin(self._link, package, blob, nursery)

    # -- device state outside of a package

    async def _device_state(self) -> bool:
        """A FULL section; True: with all that was left of the stream."""
        arrival, link = self._arrival, self._link
        if arrival.parking and not link.loader.begun:
            await self._early(arrival.parking)
        elif self._devices_are_last:
            await self._ending()
            return True
        elif arrival.postcopy.now is P.RUNNING:
            raise StreamError("unexpected section type", got=c.QEMU_VM_SECTION_FULL)
        else:
            await link.main.decode(arrival.devices.full_untrusted)
        return False

    async def _early(self, parking: Parking) -> None:
        """In front of RAM's first part."""
        devices, loader = self._arrival.devices, self._link.loader
        devices.early += await receive_early_untrusted(
            self._link.main, bytes([c.QEMU_VM_SECTION_FULL]), loader.section_id
        )
        fields.bounded(
            "device state in front of RAM", len(devices.early), c.MAX_PACKAGE
        )
        await parking.guest.set_early(devices.early)

    @property
    def _devices_are_last(self) -> bool:
        """Sections that nobody here can read, behind all of RAM."""
        # A background snapshot has no END.
        behind_ram = self._link.loader.ended or self._arrival.parking is not None
        precopy = self._arrival.postcopy.now in (P.NONE, P.ADVISE)
        return self._arrival.devices.opaque and behind_ram and precopy

    async def _ending(self) -> None:
        devices = self._arrival.devices
        devices.ending_untrusted(
            await receive_ending_untrusted(
                self._link.main, bytes([c.QEMU_VM_SECTION_FULL]), devices.early
            )
        )

    # -- the end

    async def _end(self) -> None:
        """EOF was read; with postcopy there is nothing behind it."""
        if not self._link.loader.ended:
            raise StreamError("the stream ended before its RAM section did")
        if self._arrival.postcopy.now in (P.LISTENING, P.RUNNING):
            return
        if self._arrival.parking:
            raise StreamError("the stream has no device state: this is no whole VM")
        # What is behind EOF: QEMU sends a description, others may send nothing.
        with suppress(ChannelLost):
            if await self._link.peer.next_kind() == c.QEMU_VM_VMDESCRIPTION:
                await self._link.main.decode(vmdesc.read_untrusted)

    async def nothing_more(self) -> bool:
        """Of a source that resumes and owes nothing: up to EOF; False: no EOF."""
        while await self._link.loader.sections() is not None:
            if await self._link.peer.next_kind() == c.QEMU_VM_EOF:
                return True
            await self._command(await self._link.peer.command())
        return False
