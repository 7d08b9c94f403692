"""IncomingMigration: listen, header, sections, package, run, end.

The stream is read top to bottom by one task. RAM goes through C loops; what is
read here is a dozen records per migration. When the package is there, a second
task loads the device state out of it while the first goes on with the pages,
because loading may touch pages that are still to come.

Before RUN a failure ends the migration: the source is told why (if it is srcd)
and goes on with its guest. After RUN it pauses, and nothing is thrown away.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from common import status as statuses
from common.channel import Listener
from common.errors import (
    ChannelLost,
    GuestError,
    HostError,
    MigrationError,
    StreamError,
    cause_of,
)
from common.guest.base import Device
from common.status import MigrationStatus as M
from common.status import PostcopyState as P
from common.stream import command, fields, returnpath, section, vmdesc
from common.stream import constants as c
from common.stream.package import Package, split_package_untrusted
from dstd.ending import receive_ending_untrusted
from dstd.fault import Loader, Memory, choose_way
from dstd.host import memory_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.address import Address
    from common.channel import Channel
    from common.guest.base import Guest
    from common.qmp.message import Json
    from common.settings import Settings

log = logging.getLogger(__name__)

# A source with preempt connects it before it sends the package.
PREEMPT_SECONDS: Final = 10.0
# After the source's EOF, how long the last pages may take without any arriving.
LAST_PAGES_SECONDS: Final = 30.0


@dataclass(slots=True)
class DeviceState:
    """What the sections said besides RAM; `running` is the source's run state."""

    device: Device | None = None
    state: bytes = b""
    running: bool = True


class IncomingMigration:
    """One migration into `guest`, from listening to the guest running here.

    `emit` sends a QMP event; `run_state` is told "running" or "paused" when the
    guest has arrived. `paused` is asked then: the operator may want it stopped.
    """

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: statuses.StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        paused: Callable[[], bool],
        *,
        copy: bool = False,
        overcommit: bool = False,
    ) -> None:
        self.guest = guest
        self.settings = settings
        self.status = status
        self.error: MigrationError | None = None
        self.postcopy = statuses.postcopy()
        self.memory = Memory(guest, choose_way(guest, copy=copy))
        self._overcommit = overcommit
        self._emit = emit
        self._run_state = run_state
        self._paused = paused
        self._listener: Listener | None = None
        self._main: Channel | None = None
        self._preempt: Channel | None = None
        self._preempt_came = trio.Event()
        self._loader: Loader | None = None
        self._peer_is_srcd = False
        self._peer_preempts = False
        self._committed = trio.Event()
        self._running = trio.Event()
        self._standing: trio.Nursery
        self._return_path = False
        self._refusal: MigrationError | None = None
        self._loaded = False  # PONG 3 has left: the source may give the guest up
        self._device_state = DeviceState()

    # -- listening

    async def listen(self, address: Address) -> None:
        """Bind; HostError if that is not possible. Afterwards status is setup."""
        listener = Listener(address)
        await listener.open()
        self._listener = listener
        self.status.set(M.SETUP)

    def addresses(self) -> list[dict[str, Json]]:
        return self._listener.describe() if self._listener else []

    # -- the whole

    async def run(self) -> None:
        """Take one migration; never raises a MigrationError, the status tells."""
        assert self._listener is not None
        try:
            # The fault loop outlives the connection: what is here is served to
            # the guest while the rest cannot come.
            async with trio.open_nursery() as self._standing:
                await self._one_connection()
                if self.status.now is M.POSTCOPY_PAUSED:
                    await trio.sleep_forever()
                self._standing.cancel_scope.cancel()
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            await self._failed(cause)
        finally:
            self._release()

    async def _one_connection(self) -> None:
        assert self._listener is not None
        self._main = await self._listener.accept("main")
        self.status.set(M.ACTIVE)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept_more)
                await self._receive(nursery)
                nursery.cancel_scope.cancel()
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            await self._failed(cause)
        finally:
            self._release()

    async def _accept_more(self) -> None:
        """The connection after main is preempt; a third has nothing to say here."""
        assert self._listener is not None
        assert self._main is not None
        while self._listener.many:
            channel = await self._listener.accept("preempt", self._main.stop)
            if self.settings.on("postcopy-preempt") and self._preempt is None:
                self._preempt = channel
                self._preempt_came.set()
            else:
                log.warning("closing a connection that nobody expects")
                channel.close()

    async def _receive(self, nursery: trio.Nursery) -> None:
        assert self._main is not None
        self._loader = Loader(self.memory, self._main, preempt=False)
        kind: int | None = await self._main.decode(self._head_untrusted)
        self.memory.empty()
        while kind is not None and kind != c.QEMU_VM_SECTION_START:
            kind = await self._before_ram(kind)
        await self._ram_setup()
        await self._sections(nursery)

    # -- before RAM

    def _head_untrusted(self, read: fields.Read) -> int:
        """Header and configuration; returns the type byte behind them.

        A machine that is not ours is refused a moment later, when we know whether
        the source can be told why.
        """
        section.read_file_header_untrusted(read)
        configuration, kind = section.read_configuration_untrusted(read)
        ours = self.guest.machine
        if configuration.machine != ours:
            self._refusal = HostError(
                f"the source's machine is {configuration.machine!r}, this one is"
                f" {ours!r}; start both sides with the same --machine"
            )
        if configuration.capabilities:
            self._refusal = HostError(
                "the source has capabilities on that this destination lacks:"
                f" {', '.join(configuration.capabilities)}; switch them off there"
            )
        return kind

    async def _before_ram(self, kind: int) -> int:
        """One record in front of RAM's START; the type byte of the next."""
        assert self._main is not None
        if kind != c.QEMU_VM_COMMAND:
            self._refuse_now()
            raise StreamError("unexpected in front of the RAM section", got=kind)
        found = await self._main.decode(command.read_untrusted)
        if not isinstance(found, command.OpenReturnPath | command.Ping):
            self._refuse_now()
        await self._command(found)
        return await self._main.decode(fields.u8_untrusted)

    def _refuse_now(self) -> None:
        if self._refusal:
            raise self._refusal

    async def _command(self, found: command.Command) -> None:
        """A command that may come outside of the package."""
        match found:
            case command.OpenReturnPath():
                self._return_path = True
            case command.Ping(value):
                await self._ping(value)
            case command.Advise(page_sizes, target_page):
                self._advise(page_sizes, target_page)
            case command.SwitchoverStart():
                pass
            case _:
                raise StreamError("command that does not belong here", got=found)

    async def _ping(self, value: int) -> None:
        if not self._return_path:
            raise StreamError("PING without a return path", got=value)
        await self._say(returnpath.Pong(value))
        if value == c.PING_HELLO:
            self._peer_is_srcd = True
            await self._say(returnpath.Pong(c.PONG_HELLO_ACK))
        elif value == c.PING_PREEMPT:
            self._peer_preempts = True
        elif value == c.PING_COMMIT:
            self._committed.set()

    async def _say(self, message: returnpath.Message) -> None:
        assert self._main is not None
        await self._main.write(returnpath.encode(message))

    def _advise(self, page_sizes: int, target_page: int) -> None:
        """Postcopy may follow: can this host do it, and do the pages match?"""
        if problem := self.postcopy_problem():
            raise HostError(f"the source wants postcopy: {problem}")
        if not self.settings.on("postcopy-ram"):
            raise HostError(
                "the source wants postcopy and capability postcopy-ram is off here;"
                " switch it on on both sides or on neither"
            )
        ours = 0
        for block in self.guest.blocks:
            ours |= block.page_size
        if page_sizes != ours or target_page != c.TARGET_PAGE_SIZE:
            raise HostError(
                f"the source's RAM has page sizes {page_sizes:#x}, ours has"
                f" {ours:#x}; give both sides the same --hugepages"
            )
        assert self._loader is not None
        self._loader.advise()
        self.postcopy.set(P.ADVISE)

    def _check_preempt(self) -> None:
        """Both sides or neither: srcd says early whether it will open the channel."""
        ours = self.settings.on("postcopy-preempt")
        if (
            self._peer_is_srcd
            and self.postcopy.now is P.ADVISE
            and ours != self._peer_preempts
        ):
            there, here = ("off", "on") if ours else ("on", "off")
            raise HostError(
                f"postcopy-preempt is {there} at the source and {here} here; switch"
                " it on on both sides or on neither"
            )

    def postcopy_problem(self) -> str | None:
        """Why this guest cannot be received by postcopy, and what to do."""
        if self.guest.no_userfaultfd:
            return self.guest.no_userfaultfd
        try:
            self.memory.probe()
        except HostError as error:
            return f"guest RAM cannot be registered with userfaultfd: {error}"
        return None

    async def _ram_setup(self) -> None:
        """RAM's START: every block must be ours, name by name and byte by byte."""
        assert self._main is not None
        self._refuse_now()
        self._check_preempt()
        start = await self._main.decode(
            lambda read: section.read_header_untrusted(read, c.QEMU_VM_SECTION_START)
        )
        if (
            not isinstance(start, section.Start)
            or start.name != c.RAM_SECTION
            or start.version != c.RAM_SECTION_VERSION
        ):
            raise StreamError(
                "the stream starts a section that this destination cannot load;"
                " remove the device from the source's machine",
                got=getattr(start, "name", None),
            )
        blocks = await self._main.decode(self._block_list_untrusted)
        await self._main.decode(
            lambda read: section.read_footer_untrusted(read, start.section_id)
        )
        self._check_blocks(blocks)
        assert self._loader is not None
        self._loader.begin(start.section_id)

    def _block_list_untrusted(
        self, read: fields.Read
    ) -> tuple[section.BlockEntry, ...]:
        ours = {block.idstr: block.page_size for block in self.guest.blocks}
        advised = self.postcopy.now is P.ADVISE
        return section.read_ram_setup_untrusted(
            read,
            page_size_of=(lambda name: ours.get(name, c.TARGET_PAGE_SIZE))
            if advised
            else None,
        )

    def _check_blocks(self, theirs: tuple[section.BlockEntry, ...]) -> None:
        ours = {block.idstr: block.length for block in self.guest.blocks}
        for block in theirs:
            if block.idstr not in ours:
                raise HostError(
                    f"the source has a RAM block {block.idstr!r}, which is not among"
                    f" ours ({', '.join(map(repr, ours))}); name them alike"
                )
            if block.length != ours[block.idstr]:
                raise HostError(
                    f"RAM block {block.idstr!r} has {block.length} bytes at the"
                    f" source and {ours[block.idstr]} here; give both sides the"
                    " same --memory"
                )
        for name in ours.keys() - {block.idstr for block in theirs}:
            raise HostError(
                f"our RAM block {name!r} is not among the source's; name them alike"
            )
        if not self._overcommit and (problem := memory_problem(self.guest.blocks)):
            raise HostError(problem)

    # -- sections

    async def _sections(self, nursery: trio.Nursery) -> None:
        """The stream from the first page to EOF."""
        assert self._main is not None
        assert self._loader is not None
        while True:
            kind = await self._loader.sections()
            if kind is None:
                raise ChannelLost("the channel was shut down", channel="main")
            await self._main.decode(fields.u8_untrusted)
            match kind:
                case c.QEMU_VM_COMMAND:
                    found = await self._main.decode(command.read_untrusted)
                    if isinstance(found, command.Packaged):
                        await self._package(found.size, nursery)
                    else:
                        await self._command(found)
                case c.QEMU_VM_SECTION_FULL if self._opaque and self._loader.ended:
                    await self._end_opaque(bytes([kind]))
                    return
                case c.QEMU_VM_SECTION_FULL if self.postcopy.now is not P.RUNNING:
                    await self._main.decode(self._full_untrusted)
                case c.QEMU_VM_EOF:
                    break
                case _:
                    raise StreamError("unexpected section type", got=kind)
        if self.postcopy.now in (P.LISTENING, P.RUNNING):
            await self._end_postcopy()
        else:
            await self._end_precopy()

    @property
    def _opaque(self) -> bool:
        """A guest without CPUs takes any device's state, and keeps none of it."""
        return self.guest.device is None and not self.guest.vcpus

    def _full_untrusted(self, read: fields.Read) -> None:
        """One FULL section behind its type byte; those we know have a length."""
        header = section.read_header_untrusted(read, c.QEMU_VM_SECTION_FULL)
        assert isinstance(header, section.Full)
        ours = self.guest.device
        if ours and header.name == ours.name:
            self._device_untrusted(read, header, ours)
        elif header.name == c.GLOBALSTATE_SECTION:
            self._run_state_untrusted(read)
        elif header.name == c.TIMER_SECTION:
            section.read_timer_untrusted(read)
        else:
            raise StreamError(
                "device state that this guest cannot load; start both sides with the"
                " same kind of guest",
                got=header.name,
            )
        section.read_footer_untrusted(read, header.section_id)

    def _run_state_untrusted(self, read: fields.Read) -> None:
        state = section.read_globalstate_untrusted(read)
        self._device_state.running = state.run_state == "running"

    def _device_untrusted(
        self, read: fields.Read, header: section.Full, ours: Device
    ) -> None:
        if header.version > ours.version:
            raise StreamError(
                f"device state of {ours.name} in a newer version than this guest"
                " loads; update the destination",
                expected=ours.version,
                got=header.version,
            )
        self._device_state.device = Device(name=header.name, version=header.version)
        self._device_state.state = section.read_device_state_untrusted(read)

    async def _load_device(self) -> None:
        arrived = self._device_state
        if self.guest.device and not arrived.device:
            raise StreamError(
                f"the stream has no device state of {self.guest.device.name}; start"
                " both sides with the same kind of guest"
            )
        if arrived.device:
            await self.guest.load(arrived.device, arrived.state)

    # -- precopy ends

    async def _end_precopy(self) -> None:
        assert self._main is not None
        assert self._loader is not None
        if not self._loader.ended:
            raise StreamError("the stream ended before its RAM section did")
        await self._description()
        await self._arrive()

    async def _end_opaque(self, begun: bytes) -> None:
        """The same for sections whose lengths only the description tells."""
        assert self._main is not None
        ending = await receive_ending_untrusted(self._main, begun)
        for found in ending.sections:
            if found.header.name == c.GLOBALSTATE_SECTION:
                self._run_state_untrusted(fields.over(found.body))
        await self._arrive()

    async def _arrive(self) -> None:
        """All is here: load the device state, take the guest over, run it."""
        await self._load_device()
        if self._return_path and self._peer_is_srcd:
            await self._say(returnpath.Pong(c.PING_LOADED))
            await self._wait_for_commit()
        await self._start_guest(self._device_state.running and not self._paused())
        await self._complete()

    async def _description(self) -> None:
        """What is behind EOF; QEMU sends a description, others may send nothing."""
        assert self._main is not None
        with suppress(ChannelLost):
            if await self._main.decode(fields.u8_untrusted) == c.QEMU_VM_VMDESCRIPTION:
                await self._main.decode(vmdesc.read_untrusted)

    async def _wait_for_commit(self) -> None:
        """The source's word that it will never run the guest again."""
        assert self._main is not None
        while not self._committed.is_set():
            kind = await self._main.decode(fields.u8_untrusted)
            if kind != c.QEMU_VM_COMMAND:
                raise StreamError("expected the source's COMMIT", got=kind)
            await self._command(await self._main.decode(command.read_untrusted))

    async def _start_guest(self, run: bool) -> None:
        if run:
            await self.guest.cont()
            self._run_state("running")
            self._emit("RESUME", None)
        else:
            self._run_state("paused")

    # -- postcopy

    async def _package(self, size: int, nursery: trio.Nursery) -> None:
        assert self._main is not None
        if self.postcopy.now is not P.ADVISE:
            raise StreamError("a package without ADVISE, or a second one")
        main = self._main
        package = split_package_untrusted(
            await main.decode(lambda read: fields.take_untrusted(read, size))
        )
        if not package.listen or not package.run:
            raise StreamError("a package without LISTEN first and RUN last")
        await self._preempt_needed()
        if self._loader and self._loader.discards:
            self.postcopy.set(P.DISCARD)
        self._read_package_untrusted(package)
        self.memory.connect(main)
        self.memory.listen()
        self.postcopy.set(P.LISTENING)
        self.status.set(M.POSTCOPY_ACTIVE)
        self._standing.start_soon(self.memory.faults)
        if self._preempt:
            nursery.start_soon(self._load_urgent, self._preempt)
        nursery.start_soon(self._run_package, package, nursery)

    async def _preempt_needed(self) -> None:
        """The source's urgent pages come there; it connects before the package."""
        if not self.settings.on("postcopy-preempt"):
            return
        with trio.move_on_after(PREEMPT_SECONDS):
            await self._preempt_came.wait()
            return
        raise HostError(
            "postcopy-preempt is on here and the source has opened no preempt channel;"
            " switch it on on both sides or on neither"
        )

    def _read_package_untrusted(self, package: Package) -> None:
        """The FULL sections."""
        if self._opaque:
            return
        read = fields.over(package.sections)
        while read.offset < len(package.sections):
            kind = fields.u8_untrusted(read)
            if kind != c.QEMU_VM_SECTION_FULL:
                raise StreamError("unexpected section type in the package", got=kind)
            self._full_untrusted(read)

    async def _run_package(self, package: Package, nursery: trio.Nursery) -> None:
        """Load the device state, say so, and run the guest."""
        await self._load_device()
        self._loaded = True
        for value in package.pings:
            await self._say(returnpath.Pong(value))
        if self._peer_is_srcd:
            await self._committed.wait()
        self.postcopy.set(P.RUNNING)
        await self._start_guest(True)
        self._running.set()
        nursery.start_soon(self.memory.sweep)

    async def _load_urgent(self, channel: Channel) -> None:
        """The preempt channel; its end is an error only while pages are missing."""
        loader = Loader(self.memory, channel, preempt=True)
        try:
            await loader.urgent_pages()
        except ChannelLost:
            if self.memory.missing:
                raise
        finally:
            loader.close()

    async def _end_postcopy(self) -> None:
        """EOF was read: wait for the last urgent pages, then let the source go."""
        assert self._main is not None
        await self._last_pages()
        await self._running.wait()
        self.memory.finish()
        self.postcopy.set(P.END)
        if self._preempt:
            self._preempt.break_connection()
        await self._complete()

    async def _last_pages(self) -> None:
        missing = self.memory.missing
        while missing:
            with trio.move_on_after(LAST_PAGES_SECONDS):
                await self.memory.complete()
                return
            if self.memory.missing == missing or not self._preempt:
                raise StreamError(
                    "the source ended the stream and owes pages", got=missing
                )
            missing = self.memory.missing

    # -- the ends

    async def _complete(self) -> None:
        assert self._main is not None
        if self._return_path:
            await self._say(returnpath.Shut(0))
        await self._main.drain()
        self.status.set(M.COMPLETED)

    async def _failed(self, error: MigrationError) -> None:
        log.warning("migration failed: %s", error)
        self.error = error
        can_go_on = self._loaded and self.postcopy.now in (P.LISTENING, P.RUNNING)
        if can_go_on and not isinstance(error, GuestError):
            self.memory.connect(None)
            self.status.set(M.POSTCOPY_PAUSED)
            return
        await self._tell(error)
        self.status.set(M.FAILED)

    async def _tell(self, error: MigrationError) -> None:
        """Say why and that it is over; the source goes on with its guest."""
        if not self._main or not self._return_path or isinstance(error, ChannelLost):
            return
        self._main.stop.clear()
        with suppress(MigrationError), trio.move_on_after(PREEMPT_SECONDS):
            if self._peer_is_srcd:
                await self._say(returnpath.Failure(str(error)))
            await self._say(returnpath.Shut(1))
            await self._main.drain()

    def _release(self) -> None:
        """No loop runs any more; a paused postcopy keeps its memory."""
        self.memory.connect(None)
        if self._loader:
            self._loader.close()
        for channel in (self._preempt, self._main):
            if channel:
                channel.close()
        self._preempt = self._main = None
        if self._listener:
            self._listener.close()
