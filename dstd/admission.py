"""What is refused before the source stops its guest, and in which words.

Every refusal is a HostError whose sentence names the thing that does not fit and
the way out. It is shown here and, if the source is srcd, there as well.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Final

from common.errors import HostError, StreamError
from common.guest.parking import ParkingGuest
from common.stream import constants as c
from common.stream import fields, foreign, section
from dstd.host import memory_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.guest.base import Guest
    from common.settings import Settings
    from dstd.fault import Memory


_MULTIFD: Final = (
    "the source has capability multifd on, which this destination lacks; switch it"
    " off there"
)


class Admission:
    """Compares what the source announces with this guest, these settings, this host.

    A guest that is parked is whatever the source says, if there is room for it.
    `configuration` is what the stream began with, behind its header.
    """

    def __init__(
        self, guest: Guest, settings: Settings, memory: Memory, *, overcommit: bool
    ) -> None:
        self._guest = guest
        self._settings = settings
        self._memory = memory
        self._overcommit = overcommit
        self._parking = guest if isinstance(guest, ParkingGuest) else None
        self.configuration = b""
        self._postponed: HostError | None = None

    def head_untrusted(self, read: fields.Read) -> int:
        """Header and configuration; returns the type byte behind them.

        A machine that is not ours is refused by `settle`, a moment later, when we
        know whether the source can be told why.
        """
        taken = bytearray()

        def keeping(size: int) -> bytes:
            piece = read(size)
            taken.extend(piece)
            return piece

        _file_header_untrusted(read)
        configuration, kind = section.read_configuration_untrusted(keeping)
        self.configuration = bytes(taken[:-1])
        if self._parking:
            self._parking.machine = configuration.machine
        ours = self._guest.machine
        if configuration.machine != ours:
            self._postponed = HostError(
                f"the source's machine is {configuration.machine!r}, this one is"
                f" {ours!r}; start both sides with the same --machine"
            )
        if configuration.capabilities:
            self._postponed = HostError(
                "the source has capabilities on that this destination lacks:"
                f" {', '.join(configuration.capabilities)}; switch them off there"
            )
        return kind

    def settle(self) -> None:
        """Refuse now what was found in the configuration."""
        if self._postponed:
            raise self._postponed

    def postcopy_problem(self) -> str | None:
        """Why this guest cannot be received by postcopy, and what to do."""
        if self._guest.no_userfaultfd:
            return self._guest.no_userfaultfd
        try:
            self._memory.probe()
        except HostError as error:
            return f"guest RAM cannot be registered with userfaultfd: {error}"
        return None

    def check_advise(self, page_sizes: int, target_page: int) -> None:
        """Postcopy may follow: can this host do it, and do the pages match?"""
        if problem := self.postcopy_problem():
            raise HostError(f"the source wants postcopy: {problem}")
        if self._parking:
            fields.expect("target page size", c.TARGET_PAGE_SIZE, target_page)
            return
        if not self._settings.on("postcopy-ram"):
            raise HostError(
                "the source wants postcopy and capability postcopy-ram is off here;"
                " switch it on on both sides or on neither"
            )
        ours = reduce(or_, (block.page_size for block in self._guest.blocks))
        if page_sizes != ours or target_page != c.TARGET_PAGE_SIZE:
            raise HostError(
                f"the source's RAM has page sizes {page_sizes:#x}, ours has"
                f" {ours:#x}; give both sides the same --hugepages"
            )

    def check_preempt(self, *, at_source: bool) -> None:
        """Both sides or neither: srcd says early whether it will open the channel."""
        here = self._settings.on("postcopy-preempt")
        if here != at_source and not self._parking:
            words = {True: "on", False: "off"}
            raise HostError(
                f"postcopy-preempt is {words[at_source]} at the source and"
                f" {words[here]} here; switch it on on both sides or on neither"
            )

    def check_start(self, start: section.Header) -> None:
        """RAM is the only section in parts that we have."""
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

    def block_list_untrusted(
        self, read: fields.Read, *, advised: bool
    ) -> tuple[section.BlockEntry, ...]:
        if self._parking:
            return _foreign_blocks_untrusted(read, advised=advised)
        ours = {block.idstr: block.page_size for block in self._guest.blocks}

        def page_size_of(idstr: str) -> int:
            return ours.get(idstr, c.TARGET_PAGE_SIZE)

        return section.read_ram_setup_untrusted(
            read, page_size_of=page_size_of if advised else None
        )

    def check_blocks(self, theirs: Sequence[section.BlockEntry]) -> None:
        """Every block must be ours, name by name and byte by byte, and fit."""
        if self._parking:
            return self._check_room(self._parking, theirs)
        ours = {block.idstr: block.length for block in self._guest.blocks}
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
        if not self._overcommit and (problem := memory_problem(self._guest.blocks)):
            raise HostError(problem)

    def _check_room(
        self, guest: ParkingGuest, theirs: Sequence[section.BlockEntry]
    ) -> None:
        needed = sum(block.length for block in theirs)
        room = guest.room()
        if room is not None and needed > room and not self._overcommit:
            raise HostError(
                f"the guest has {needed >> 20} MiB of RAM and {guest.directory} has"
                f" room for {room >> 20} MiB; make room on that file system, or start"
                " dstd with --overcommit if most of it is empty"
            )


def _file_header_untrusted(read: fields.Read) -> None:
    try:
        section.read_file_header_untrusted(read)
    except StreamError as error:
        if error.got == c.MULTIFD_MAGIC:
            raise HostError(_MULTIFD) from None
        raise


def _foreign_blocks_untrusted(
    read: fields.Read, *, advised: bool
) -> tuple[section.BlockEntry, ...]:
    try:
        return foreign.read_ram_setup_untrusted(read, advised=advised)
    except StreamError as error:
        # In front of the list's end there is only this, and only with multifd.
        if error.got == c.RAM_SAVE_FLAG_MULTIFD_FLUSH:
            raise HostError(_MULTIFD) from None
        raise
