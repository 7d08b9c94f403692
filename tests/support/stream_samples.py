"""One sample of every record of the stream: its bytes, its value, both codecs.

The hex was captured from QEMU 10.0.2, or built and then accepted by it, except
where a sample is `ours`. Tests run each sample in both directions, cut it at
every byte and change its bytes; the fuzzer starts from them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import StreamError
from common.stream import (
    bitmap,
    command,
    constants,
    fields,
    package,
    ram,
    returnpath,
    section,
    vmdesc,
)

Decode = Callable[[bytes], Any]


@dataclass(frozen=True)
class Sample:
    """`decode(wire) == value` and `encode(value) == wire`.

    A `delimited` record says itself where it ends, so that no proper beginning
    of it can be decoded.
    """

    name: str
    wire: bytes
    value: Any
    decode: Decode
    encode: Callable[[Any], bytes]
    delimited: bool = True


def whole(decode: Callable[[fields.Read], Any]) -> Decode:
    """Make a decoder of exactly these bytes from one that takes a read."""

    def decode_whole(wire: bytes) -> Any:
        read = fields.over(wire)
        with read.located():
            value = decode(read)
            if read.offset != len(wire):
                raise StreamError("bytes are left over", read.offset)
        return value

    return decode_whole


def hexed(text: str) -> bytes:
    """Bytes of a hex dump; what follows a # is a remark."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.split("\n")))


# --- Codecs in the shape of a Sample -----------------------------------------


def decode_file_header(wire: bytes) -> None:
    whole(section.read_file_header_untrusted)(wire)


decode_configuration = whole(section.read_configuration_untrusted)


def encode_configuration(value: tuple[section.Configuration, int]) -> bytes:
    configuration, behind = value
    return section.encode_configuration(configuration) + bytes([behind])


@whole
def decode_header(read: fields.Read) -> section.Header:
    return section.read_header_untrusted(read, fields.u8_untrusted(read))


@whole
def decode_footer(read: fields.Read) -> int:
    section.read_footer_untrusted(read, 1)
    return 1


decode_setup = whole(section.read_ram_setup_untrusted)


@whole
def decode_huge_setup(read: fields.Read) -> Any:
    sizes = {"pc.ram": 2 << 20, "pc.bios": 4096}
    return section.read_ram_setup_untrusted(
        read, page_size_of=lambda idstr: sizes.get(idstr, 4096)
    )


@whole
def decode_shared_setup(read: fields.Read) -> Any:
    return section.read_ram_setup_untrusted(read, guest_addresses=True)


decode_globalstate = whole(section.read_globalstate_untrusted)
decode_timer = whole(section.read_timer_untrusted)
decode_device_state = whole(section.read_device_state_untrusted)


@whole
def decode_command(read: fields.Read) -> command.Command:
    fields.expect("command byte", constants.QEMU_VM_COMMAND, fields.u8_untrusted(read))
    return command.read_untrusted(read)


decode_message = whole(returnpath.read_untrusted)
decode_record = whole(ram.read_untrusted)

BITMAP_PAGES = 3


@whole
def decode_bitmap(read: fields.Read) -> bytes:
    return bitmap.read_untrusted(read, BITMAP_PAGES)


def encode_bitmap(bits: bytes) -> bytes:
    return bitmap.encode(bits, BITMAP_PAGES)


@whole
def decode_description(read: fields.Read) -> bytes:
    kind = fields.u8_untrusted(read)
    fields.expect("description byte", constants.QEMU_VM_VMDESCRIPTION, kind)
    return vmdesc.read_untrusted(read)


@whole
def decode_body(read: fields.Read) -> list[ram.Record]:
    """The records of a RAM section's body, as far as its end."""
    reader = ram.RecordReader(read, {"ram": 64 << 20, "pc.ram": 32 << 20})
    records = [reader.next_untrusted()]
    while records[-1] != ram.Eos():
        records.append(reader.next_untrusted())
    return records


def encode_body(records: list[ram.Record]) -> bytes:
    writer = ram.RecordWriter()
    return b"".join(_encode_record(writer, record) for record in records)


def _encode_record(writer: ram.RecordWriter, record: ram.Record) -> bytes:
    match record:
        case ram.Zero(offset, str(block)):
            return writer.zero(block, offset)
        case ram.Page(offset, str(block), data):
            return writer.page(block, offset, data)
        case _:
            return ram.encode(record)


def encode_ending(ending: vmdesc.Ending) -> bytes:
    return (
        b"".join(section.encode_section(s.header, s.body) for s in ending.sections)
        + section.EOF
        + vmdesc.encode(ending.text)
    )


# --- The samples -------------------------------------------------------------

PAGE = bytes(range(256)) * 16
RUNNING = section.GlobalState("running")
TIMER = section.Timer(0x80AB669, 0x349D9A0)


def full(section_id: int, name: str, version: int = 1) -> section.Full:
    return section.Full(section_id=section_id, name=name, instance=0, version=version)


FILE_HEADER = Sample(
    "file header",
    hexed("51 45 56 4d 00 00 00 03"),
    None,
    decode_file_header,
    lambda _: section.FILE_HEADER,
)

CONFIGURATIONS = [
    Sample(
        name,
        hexed(text),
        (section.Configuration(machine="none", **more), constants.QEMU_VM_COMMAND),
        decode_configuration,
        encode_configuration,
    )
    for name, more, text in [
        ("configuration", {}, "07 00 00 00 04 6e 6f 6e 65   08"),
        (
            "configuration with subsections",
            {
                "capabilities": ("x-ignore-shared",),
                "uuid": uuid.UUID("12345678-1234-5678-9abc-def012345678"),
            },
            """
            07 00 00 00 04 6e 6f 6e 65
            05 1a 63 6f 6e 66 69 67 75 72 61 74 69 6f 6e 2f
            63 61 70 61 62 69 6c 69 74 69 65 73
            00 00 00 01 00 00 00 01
            0f 78 2d 69 67 6e 6f 72 65 2d 73 68 61 72 65 64
            05 12 63 6f 6e 66 69 67 75 72 61 74 69 6f 6e 2f 75 75 69 64
            00 00 00 01
            12 34 56 78 12 34 56 78 9a bc de f0 12 34 56 78   08
            """,
        ),
        (
            "configuration with page bits",
            {"target_page_bits": 16},
            """
            07 00 00 00 04 6e 6f 6e 65
            05 1e 63 6f 6e 66 69 67 75 72 61 74 69 6f 6e 2f
            74 61 72 67 65 74 2d 70 61 67 65 2d 62 69 74 73
            00 00 00 01 00 00 00 10   08
            """,
        ),
    ]
]

HEADERS = [
    Sample(f"header of {name}", hexed(text), value, decode_header, section.encode)
    for name, value, text in [
        (
            "START",
            section.RAM_START,
            "01 00 00 00 01 03 72 61 6d 00 00 00 00 00 00 00 04",
        ),
        ("PART", section.Part(section_id=1), "02 00 00 00 01"),
        ("END", section.End(section_id=0xFFFFFFFF), "03 ff ff ff ff"),
        (
            "FULL timer",
            full(0, "timer", 2),
            "04 00 00 00 00 05 74 69 6d 65 72 00 00 00 00 00 00 00 02",
        ),
        (
            "FULL globalstate",
            full(3, "globalstate"),
            """
            04 00 00 00 03 0b 67 6c 6f 62 61 6c 73 74 61 74 65
            00 00 00 00 00 00 00 01
            """,
        ),
    ]
]

FOOTER = Sample(
    "footer", hexed("7e 00 00 00 01"), 1, decode_footer, section.encode_footer
)

SETUPS = [
    Sample(name, hexed(text), value, decode, section.encode_ram_setup)
    for name, value, decode, text in [
        (
            "RAM setup",
            (section.BlockEntry(idstr="ram", length=64 << 20),),
            decode_setup,
            """
            00 00 00 00 04 00 00 04                     # MEM_SIZE, total 0x4000000
            03 72 61 6d 00 00 00 00 04 00 00 00         # "ram", 0x4000000
            00 00 00 00 00 00 00 10                     # EOS
            """,
        ),
        (
            "RAM setup of nothing",
            (),
            decode_setup,
            "00 00 00 00 00 00 00 04  00 00 00 00 00 00 00 10",
        ),
        (
            "RAM setup with huge pages",
            (
                section.BlockEntry(idstr="pc.ram", length=32 << 20, page_size=2 << 20),
                section.BlockEntry(idstr="pc.bios", length=0x40000),
            ),
            decode_huge_setup,
            """
            00 00 00 00 02 04 00 04
            06 70 63 2e 72 61 6d 00 00 00 00 02 00 00 00 00 00 00 00 00 20 00 00
            07 70 63 2e 62 69 6f 73 00 00 00 00 00 04 00 00
            00 00 00 00 00 00 00 10
            """,
        ),
        (
            "RAM setup with guest addresses",
            (section.BlockEntry(idstr="ram", length=64 << 20, guest_address=0),),
            decode_shared_setup,
            """
            00 00 00 00 04 00 00 04
            03 72 61 6d 00 00 00 00 04 00 00 00 00 00 00 00 00 00 00 00
            00 00 00 00 00 00 00 10
            """,
        ),
    ]
]

BODIES = [
    Sample(
        "globalstate",
        hexed("00 00 00 08 72 75 6e 6e 69 6e 67") + bytes(25) + b"\1\0" + bytes(66),
        RUNNING,
        decode_globalstate,
        section.encode_globalstate,
    ),
    Sample(
        "timer",
        hexed(
            "00 00 00 00 08 0a b6 69 00 00 00 00 00 00 00 00 00 00 00 00 03 49 d9 a0"
        ),
        TIMER,
        decode_timer,
        section.encode_timer,
    ),
    Sample(
        "device state (ours)",
        hexed("00 00 00 05 73 74 61 74 65"),
        b"state",
        decode_device_state,
        section.encode_device_state,
    ),
]

COMMANDS = [
    Sample(str(value), hexed(text), value, decode_command, command.encode)
    for value, text in [
        (command.OpenReturnPath(), "08 00 01 00 00"),
        (command.Ping(1), "08 00 02 00 04 00 00 00 01"),
        (
            command.Advise(0x1000),
            "08 00 03 00 10 00 00 00 00 00 00 10 00 00 00 00 00 00 00 10 00",
        ),
        (
            command.Advise(0x201000),
            "08 00 03 00 10 00 00 00 00 00 20 10 00 00 00 00 00 00 00 10 00",
        ),
        (command.AdviseEmpty(), "08 00 03 00 00"),
        (command.SwitchoverStart(), "08 00 0b 00 00"),
        (
            command.RamDiscard("ram", ((0x17FE000, 0x2802000),)),
            """
            08 00 06 00 16 00 03 72 61 6d 00
            00 00 00 00 01 7f e0 00
            00 00 00 00 02 80 20 00
            """,
        ),
        (command.Packaged(201), "08 00 07 00 04 00 00 00 c9"),
        (command.Listen(), "08 00 04 00 00"),
        (command.Run(), "08 00 05 00 00"),
        (command.RecvBitmap("pc.ram"), "08 00 0a 00 07 06 70 63 2e 72 61 6d"),
        (command.Resume(), "08 00 09 00 00"),
    ]
]

MESSAGES = [
    Sample(str(value), hexed(text), value, decode_message, returnpath.encode)
    for value, text in [
        (returnpath.Pong(1), "00 02 00 04 00 00 00 01"),
        (returnpath.SwitchoverAck(), "00 07 00 00"),
        (
            returnpath.ReqPages(0x17A5000, 0x1000, "pc.ram"),
            "00 03 00 13 00 00 00 00 01 7a 50 00 00 00 10 00 06 70 63 2e 72 61 6d",
        ),
        (
            returnpath.ReqPages(0x17A2000, 0x1000),
            "00 04 00 0c 00 00 00 00 01 7a 20 00 00 00 10 00",
        ),
        (
            returnpath.ReqPages(0x200000, 0x200000, "pc.ram"),
            "00 03 00 13 00 00 00 00 00 20 00 00 00 20 00 00 06 70 63 2e 72 61 6d",
        ),
        (
            returnpath.RecvBitmap("/rom@etc/acpi/rsdp"),
            """
            00 05 00 13 12
            2f 72 6f 6d 40 65 74 63 2f 61 63 70 69 2f 72 73 64 70
            """,
        ),
        (returnpath.ResumeAck(), "00 06 00 04 00 00 00 01"),
        (returnpath.Shut(0), "00 01 00 04 00 00 00 00"),
        (returnpath.Failure("ours"), "80 01 00 04 6f 75 72 73"),
    ]
]

RECORDS = [
    Sample(name, wire, value, decode_record, ram.encode)
    for name, value, wire in [
        (
            "PAGE that names its block",
            ram.Page(0, "ram", PAGE),
            hexed("00 00 00 00 00 00 00 08 03 72 61 6d") + PAGE,
        ),
        (
            "ZERO that names its block",
            ram.Zero(0x17FE000, "ram"),
            hexed("00 00 00 00 01 7f e0 02 03 72 61 6d 00"),
        ),
        (
            "ZERO that continues",
            ram.Zero(0x17FF000, None),
            hexed("00 00 00 00 01 7f f0 22 00"),
        ),
        (
            "PAGE on the preempt channel",
            ram.Page(0x17A5000, "pc.ram", PAGE),
            hexed("00 00 00 00 01 7a 50 08 06 70 63 2e 72 61 6d") + PAGE,
        ),
        (
            "PAGE that continues",
            ram.Page(0x17A2000, None, PAGE),
            hexed("00 00 00 00 01 7a 20 28") + PAGE,
        ),
        ("EOS", ram.Eos(), hexed("00 00 00 00 00 00 00 10")),
        ("MEM_SIZE", ram.MemSize(0x4000000), hexed("00 00 00 00 04 00 00 04")),
        ("MULTIFD_FLUSH", ram.MultifdFlush(), hexed("00 00 00 00 00 00 02 00")),
    ]
]

BODY = Sample(
    "PART body",
    hexed("00 00 00 00 00 00 00 08 03 72 61 6d")
    + PAGE
    + hexed(
        """
        00 00 00 00 01 7f e0 22 00                  # block continues
        00 00 00 00 01 7f f0 22 00
        00 00 00 00 00 00 00 10                     # EOS
        """
    ),
    [
        ram.Page(0, "ram", PAGE),
        ram.Zero(0x17FE000, "ram"),
        ram.Zero(0x17FF000, "ram"),
        ram.Eos(),
    ],
    decode_body,
    encode_body,
)

BITMAP = Sample(
    "received bitmap",
    hexed(
        """
        00 00 00 00 00 00 00 08 00 00 00 00 00 00 00 00
        01 23 45 67 89 ab cd ef
        """
    ),
    bytes(8),
    decode_bitmap,
    encode_bitmap,
)

SECTIONS = section.encode_section(
    full(0, "timer", 2), section.encode_timer(TIMER)
) + section.encode_section(full(3, "globalstate"), section.encode_globalstate(RUNNING))

PACKAGE = Sample(
    "package of a machine without devices",
    hexed("08 00 04 00 00")
    + SECTIONS
    + hexed("08 00 02 00 04 00 00 00 03  08 00 05 00 00"),
    package.Package(sections=SECTIONS),
    package.split_package_untrusted,
    package.encode_package,
    delimited=False,
)

DESCRIPTION = vmdesc.describe(
    [vmdesc.GLOBALSTATE, vmdesc.device_state("microvm", 2, 5)]
)

FRAME = Sample("description", b"\6\0\0\0\2{}", b"{}", decode_description, vmdesc.encode)

ENDING_SECTIONS = section.encode_section(
    full(3, "globalstate"), section.encode_globalstate(RUNNING)
) + section.encode_section(full(4, "microvm", 2), b"\0\0\0\5state")

ENDING = Sample(
    "ending (ours)",
    ENDING_SECTIONS + b"\0\6" + len(DESCRIPTION).to_bytes(4, "big") + DESCRIPTION,
    vmdesc.Ending(
        (
            vmdesc.Section(full(3, "globalstate"), section.encode_globalstate(RUNNING)),
            vmdesc.Section(full(4, "microvm", 2), b"\0\0\0\5state"),
        ),
        DESCRIPTION,
        ENDING_SECTIONS,
    ),
    vmdesc.split_ending_untrusted,
    encode_ending,
    delimited=False,
)

SAMPLES = [
    FILE_HEADER,
    *CONFIGURATIONS,
    *HEADERS,
    FOOTER,
    *SETUPS,
    *BODIES,
    *COMMANDS,
    *MESSAGES,
    *RECORDS,
    BODY,
    BITMAP,
    PACKAGE,
    FRAME,
    ENDING,
]
