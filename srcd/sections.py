"""What the source writes besides pages: opening, block list, device state, ends.

What a parked VM brought along is written as it came.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Final

from common.guest.stored import NO_DESCRIPTION, StoredGuest
from common.stream import command, fields, section, vmdesc
from common.stream import constants as c
from common.stream.package import Package, encode_package

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.guest.base import Guest, RamBlock

EOS: Final = fields.be64(c.RAM_SAVE_FLAG_EOS)


def ram_section_id(guest: Guest) -> int:
    if isinstance(guest, StoredGuest):
        return c.PARKED_RAM_SECTION_ID
    return c.RAM_SECTION_ID


def ram_end(guest: Guest) -> bytes:
    """The section that says that no page is to come any more."""
    return section.encode_section(section.End(section_id=ram_section_id(guest)), EOS)


def opening(guest: Guest, *, return_path: bool, postcopy: bool, preempt: bool) -> bytes:
    """From the file header to RAM's START: all that a destination may refuse."""
    parts = [section.FILE_HEADER, _configuration(guest)]
    commands: list[command.Command] = []
    if return_path:
        commands += [
            command.OpenReturnPath(),
            command.Ping(c.PING_FIRST),
            command.Ping(c.PING_HELLO),
        ]
    if postcopy:
        sizes = reduce(or_, (block.page_size for block in guest.blocks))
        commands.append(command.Advise(sizes, c.TARGET_PAGE_SIZE))
    if postcopy and preempt:
        commands.append(command.Ping(c.PING_PREEMPT))
    parts += map(command.encode, commands)
    parts.append(
        section.encode_section(
            replace(section.RAM_START, section_id=ram_section_id(guest)),
            _block_list(guest.blocks, advised=postcopy),
        )
    )
    if isinstance(guest, StoredGuest):
        parts.append(guest.parked.early)
    return b"".join(parts)


def _configuration(guest: Guest) -> bytes:
    if isinstance(guest, StoredGuest):
        return guest.parked.configuration
    return section.encode_configuration(section.Configuration(machine=guest.machine))


def _block_list(blocks: Sequence[RamBlock], *, advised: bool) -> bytes:
    return section.encode_ram_setup(
        [
            section.BlockEntry(
                idstr=block.idstr,
                length=block.length,
                page_size=(
                    section.listed_page_size(block.page_size) if advised else None
                ),
            )
            for block in blocks
        ]
    )


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The FULL sections of a stopped guest, what is around them in a stream."""

    ram_end: bytes
    sections: bytes
    description: bytes

    def ending(self) -> bytes:
        """The end of a precopy stream: RAM's END, these, EOF, description."""
        description = vmdesc.encode(self.description)
        return self.ram_end + self.sections + section.EOF + description

    def package(self) -> bytes:
        """The switch to postcopy, from the discards to the pages."""
        package = encode_package(Package(sections=self.sections))
        return b"".join(
            (
                command.encode(command.Ping(c.PING_DISCARDED)),
                command.encode(command.Packaged(len(package))),
                package,
                command.encode(command.Ping(c.PING_LISTENING)),
            )
        )


async def save_device_state(guest: Guest, run_state: str) -> DeviceState:
    """Ask the stopped guest for its state; `run_state` is what it was before."""
    if isinstance(guest, StoredGuest):
        description = guest.parked.vmdesc or NO_DESCRIPTION
        return DeviceState(ram_end(guest), guest.parked.device_state, description)
    sections = b""
    described: tuple[vmdesc.Device, ...] = ()
    if (device := guest.device) is not None:
        state = await guest.save()
        header = section.Full(
            section_id=c.DEVICE_SECTION_ID,
            name=device.name,
            instance=0,
            version=device.version,
        )
        body = section.encode_device_state(state)
        sections += section.encode_section(header, body)
        described += (vmdesc.device_state(device.name, device.version, len(state)),)
    header = section.Full(
        section_id=c.GLOBALSTATE_SECTION_ID,
        name=c.GLOBALSTATE_SECTION,
        instance=0,
        version=c.GLOBALSTATE_SECTION_VERSION,
    )
    body = section.encode_globalstate(section.GlobalState(run_state))
    sections += section.encode_section(header, body)
    description = vmdesc.describe((*described, vmdesc.GLOBALSTATE))
    return DeviceState(ram_end(guest), sections, description)
