"""Streams in files, put together by hand: small ones with everything in them."""

from __future__ import annotations

import random

from common.stream import command, fields, ram, section, vmdesc
from common.stream import constants as c

PAGE = 4096
LENGTH = 40 * PAGE
RAM_ID = 3
BLOCKS = {"pc.ram": LENGTH, "rom": 2 * PAGE}
DICE = random.Random(3)
DATA = {("pc.ram", 5): DICE.randbytes(PAGE), ("rom", 1): DICE.randbytes(PAGE)}

EARLY = section.encode_section(
    section.Full(section_id=8, name="virtio-mem-early", instance=0, version=1),
    section.encode_device_state(b"early" * 20),
)
DEVICE = section.encode_section(
    section.Full(section_id=9, name="thing", instance=0, version=1),
    section.encode_device_state(b"state" * 20),
)
GLOBALSTATE = section.encode_section(
    section.Full(section_id=11, name="globalstate", instance=0, version=1),
    section.encode_globalstate(section.GlobalState("paused")),
)
_DEVICE = vmdesc.device_state("thing", 1, 100)
TEXT = vmdesc.describe([_DEVICE, vmdesc.GLOBALSTATE])
TEXT_EARLY = vmdesc.describe(
    [vmdesc.device_state("virtio-mem-early", 1, 100), _DEVICE, vmdesc.GLOBALSTATE]
)
ENDING = DEVICE + GLOBALSTATE + section.EOF + vmdesc.encode(TEXT)


def head(*capabilities: str) -> bytes:
    return section.FILE_HEADER + section.encode_configuration(
        section.Configuration(machine="pc-q35-10.0", capabilities=capabilities)
    )


def start(name: str = "ram", version: int = 4) -> section.Start:
    return section.Start(section_id=RAM_ID, name=name, instance=0, version=version)


SETUP = section.encode_section(
    start(),
    section.encode_ram_setup(
        [section.BlockEntry(idstr=name, length=size) for name, size in BLOCKS.items()]
    ),
)


def part(*records: ram.Record, end: bool = False) -> bytes:
    kind = section.End if end else section.Part
    body = b"".join(map(ram.encode, (*records, ram.Eos())))
    return section.encode_section(kind(section_id=RAM_ID), body)


PAGES = part(
    ram.Page(0, "pc.ram", b"x" * PAGE),
    *(ram.Page(page * PAGE, name, data) for (name, page), data in DATA.items()),
    ram.Zero(0, "pc.ram"),  # it was data, and is not any more
)
SWITCHOVER = command.encode(command.SwitchoverStart())
RAM = SETUP + PAGES + SWITCHOVER + part(end=True)
PLAIN = head() + RAM + ENDING


def mapped_block(name: str, begin: int, *, stale: bool = False) -> bytes:
    """A block whose entry begins at `begin` of the file, with its pages."""
    length = BLOCKS[name]
    pages = length // PAGE
    bits = bytearray(-(-pages // 64) * 8)
    content = bytearray(length)
    if stale:
        content[7 * PAGE : 8 * PAGE] = b"\xaa" * PAGE
    for (block, page), data in DATA.items():
        if block == name:
            bits[page // 8] |= 1 << page % 8
            content[page * PAGE : (page + 1) * PAGE] = data
    entry = fields.name(name) + fields.be64(length) + fields.be32(1) + fields.be64(PAGE)
    bits_at = begin + len(entry) + 16
    pages_at = -(-(bits_at + len(bits)) // PAGE) * PAGE
    entry += fields.be64(bits_at) + fields.be64(pages_at) + bits
    return entry.ljust(pages_at - begin, b"\0") + content


def mapped_file(*, stale: bool = False) -> bytes:
    total = sum(BLOCKS.values())
    file = head("mapped-ram") + section.encode(start())
    file += fields.be64(total | c.RAM_SAVE_FLAG_MEM_SIZE)
    file += mapped_block("pc.ram", len(file), stale=stale)
    file += mapped_block("rom", len(file))
    file += fields.be64(c.RAM_SAVE_FLAG_EOS) + section.encode_footer(RAM_ID)
    return file + part() + SWITCHOVER + part(ram.MultifdFlush(), end=True) + ENDING
