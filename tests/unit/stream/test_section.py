"""The skeleton of a stream, beyond what the samples show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import (
    RUNNING,
    TIMER,
    decode_configuration,
    decode_device_state,
    decode_globalstate,
    decode_header,
    decode_setup,
    decode_shared_setup,
    decode_timer,
    encode_configuration,
    full,
    hexed,
    whole,
)

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, ram, section

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60)
be32s = st.integers(0, 2**32 - 1)
named = {"section_id": be32s, "name": names, "instance": be32s, "version": be32s}

configurations = st.builds(
    section.Configuration,
    machine=st.just("") | names,
    target_page_bits=st.none() | be32s,
    capabilities=st.lists(names, max_size=c.MAX_CAPABILITIES).map(tuple),
    uuid=st.none() | st.uuids(),
)
headers = st.one_of(
    st.builds(section.Start, **named),
    st.builds(section.Full, **named),
    st.builds(section.Part, section_id=be32s),
    st.builds(section.End, section_id=be32s),
)
lengths = st.integers(1, 1 << 20).map(lambda pages: pages * c.TARGET_PAGE_SIZE)
signed = st.integers(-(2**63), 2**63 - 1)


def block(idstr: str, length: int = 4096, **more: int) -> section.BlockEntry:
    return section.BlockEntry(idstr=idstr, length=length, **more)


# --- Round trips -------------------------------------------------------------


@given(configurations, st.integers(0, 255).filter(lambda kind: kind != 5))
def test_configuration(configuration, behind):
    value = (configuration, behind)
    assert decode_configuration(encode_configuration(value)) == value


@given(headers)
def test_header(header):
    assert decode_header(section.encode(header)) == header


@given(st.dictionaries(names, lengths, max_size=20))
def test_ram_setup(blocks):
    entries = tuple(block(idstr, length) for idstr, length in blocks.items())
    assert decode_setup(section.encode_ram_setup(entries)) == entries


@given(st.dictionaries(names, st.sampled_from([4096, 2 << 20, 1 << 30]), max_size=20))
def test_ram_setup_with_page_sizes(sizes):
    """Only blocks of huge pages carry the field, in one and the same list."""
    entries = tuple(
        block(idstr, 1 << 30, page_size=section.listed_page_size(size))
        for idstr, size in sizes.items()
        if size
    )
    decode = whole(
        lambda read: section.read_ram_setup_untrusted(read, page_size_of=sizes.get)
    )
    wire = section.encode_ram_setup(entries)
    assert decode(wire) == entries
    huge = sum(size != 4096 for size in sizes.values())
    plain = section.encode_ram_setup([block(entry.idstr, 1 << 30) for entry in entries])
    assert len(wire) - len(plain) == 8 * huge


@given(st.dictionaries(names, st.integers(0, 2**64 - 1), max_size=20))
def test_ram_setup_with_guest_addresses(addresses):
    entries = tuple(
        block(idstr, guest_address=address) for idstr, address in addresses.items()
    )
    assert decode_shared_setup(section.encode_ram_setup(entries)) == entries


@given(st.from_regex(r"[a-z-]{0,31}", fullmatch=True), st.booleans())
def test_globalstate(run_state, suspended):
    state = section.GlobalState(run_state, suspended)
    wire = section.encode_globalstate(state)
    assert len(wire) == section.GLOBALSTATE_SIZE
    assert decode_globalstate(wire) == state


@given(signed, signed)
def test_timer(ticks, clock):
    timer = section.Timer(ticks, clock)
    assert decode_timer(section.encode_timer(timer)) == timer


@given(st.binary(max_size=100))
def test_device_state(state):
    assert decode_device_state(section.encode_device_state(state)) == state


# --- What is put together from several records -------------------------------


def test_ram_start_as_captured():
    body = section.encode_ram_setup([block("ram", 64 << 20)])
    assert section.encode_section(section.RAM_START, body) == hexed(
        """
        01 00 00 00 01 03 72 61 6d 00 00 00 00 00 00 00 04
        00 00 00 00 04 00 00 04
        03 72 61 6d 00 00 00 00 04 00 00 00
        00 00 00 00 00 00 00 10
        7e 00 00 00 01
        """
    )


CAPTURED_ENDING = (
    hexed(
        """
        03 00 00 00 01 00 00 00 00 00 00 00 10 7e 00 00 00 01
        04 00 00 00 00 05 74 69 6d 65 72 00 00 00 00 00 00 00 02
        00 00 00 00 08 0a b6 69 00 00 00 00 00 00 00 00 00 00 00 00 03 49 d9 a0
        7e 00 00 00 00
        04 00 00 00 03 0b 67 6c 6f 62 61 6c 73 74 61 74 65 00 00 00 00 00 00 00 01
        00 00 00 08 72 75 6e 6e 69 6e 67
        """
    )
    + bytes(25)
    + b"\1\0"
    + bytes(66)
    + hexed("7e 00 00 00 03 00")
)


def test_precopy_ending_encodes_as_captured():
    assert (
        b"".join(
            (
                section.encode_section(
                    section.End(section_id=1), ram.encode(ram.Eos())
                ),
                section.encode_section(
                    full(0, "timer", 2), section.encode_timer(TIMER)
                ),
                section.encode_section(
                    full(3, "globalstate"), section.encode_globalstate(RUNNING)
                ),
                section.EOF,
            )
        )
        == CAPTURED_ENDING
    )


def test_precopy_ending_decodes_as_captured():
    read = fields.over(CAPTURED_ENDING)
    bodies = {
        "timer": section.read_timer_untrusted,
        "globalstate": section.read_globalstate_untrusted,
    }
    seen = []
    while kind := fields.u8_untrusted(read):
        header = section.read_header_untrusted(read, kind)
        if isinstance(header, section.Full):
            seen.append(bodies[header.name](read))
        else:
            seen.append(ram.read_untrusted(read))
        section.read_footer_untrusted(read, header.section_id)
    assert seen == [ram.Eos(), TIMER, RUNNING]
    assert read.offset == len(CAPTURED_ENDING)


# --- Refusals ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        ("51 45 56 4d 00 00 00 02", "stream version"),
        ("51 45 56 4d 00 00 00 04", "stream version"),
        ("11 22 33 44 00 00 00 01", "magic"),
        ("08 00 0a 00 07 06 70 63", "magic"),
    ],
)
def test_file_header_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        section.read_file_header_untrusted(fields.over(hexed(wire)))


def configuration_with(*subsections: bytes) -> bytes:
    return b"\7\0\0\0\4none" + b"".join(subsections) + b"\0"


def subsection(name: str, payload: bytes, version: int = 1) -> bytes:
    return b"\5" + fields.name(name) + fields.be32(version) + payload


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (b"\4\0\0\0\4none\0", "section type"),
        (configuration_with(subsection("configuration/x", b"")), "unknown"),
        (
            configuration_with(*2 * [subsection(c.CONFIGURATION_UUID, bytes(16))]),
            "repeated",
        ),
        (
            configuration_with(subsection(c.CONFIGURATION_UUID, bytes(16), 2)),
            "version",
        ),
    ],
)
def test_configuration_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        decode_configuration(wire)


def setup(*entries: tuple[str, int], total: int | None = None) -> bytes:
    """A setup body that need not make sense."""
    size = sum(length for _, length in entries) if total is None else total
    return b"".join(
        (
            fields.be64(size | c.RAM_SAVE_FLAG_MEM_SIZE),
            *(fields.name(idstr) + fields.be64(length) for idstr, length in entries),
            fields.be64(c.RAM_SAVE_FLAG_EOS),
        )
    )


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (setup(("a", 4096), ("a", 4096)), "repeated"),
        (setup(("a", 8192), total=4096), "exceed"),
        (setup(("a", 0), ("b", 4096)), "whole pages"),
        (setup(("a", 4097), total=8192), "whole pages"),
        (fields.be64(4096 | c.RAM_SAVE_FLAG_ZERO), "RAM setup"),
        (setup(("a", 4096))[:-8] + fields.be64(8), "end of RAM setup"),
    ],
)
def test_ram_setup_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        decode_setup(wire)


def test_host_page_sizes_must_agree():
    wire = section.encode_ram_setup([block("a", 1 << 30, page_size=1 << 30)])
    decode = whole(
        lambda read: section.read_ram_setup_untrusted(
            read, page_size_of=lambda _: 2 << 20
        )
    )
    with pytest.raises(StreamError, match="host page size of RAM block a") as caught:
        decode(wire)
    assert (caught.value.expected, caught.value.got) == (2 << 20, 1 << 30)


@pytest.mark.parametrize("kind", [0, 5, 6, 7, 8, 9, 0x7E, 255])
def test_only_sections_have_headers(kind):
    with pytest.raises(StreamError, match="section type"):
        section.read_header_untrusted(fields.over(bytes(64)), kind)


@pytest.mark.parametrize("wire", ["7e 00 00 00 02", "7f 00 00 00 01"])
def test_footer_must_match(wire):
    with pytest.raises(StreamError, match="section"):
        section.read_footer_untrusted(fields.over(hexed(wire)), 1)


@pytest.mark.parametrize("size", [0, 34, 2**32 - 1])
def test_globalstate_length_refused(size):
    wire = fields.be32(size) + bytes(100)
    with pytest.raises(StreamError, match="run state"):
        decode_globalstate(wire)


def test_globalstate_of_7_2():
    """No suspended flag: zero bytes where it is now."""
    assert decode_globalstate(fields.be32(7) + b"paused".ljust(100, b"\0")) == (
        section.GlobalState("paused")
    )


# --- Limits, on both sides ---------------------------------------------------


def test_machine_name_limit():
    at = section.Configuration(machine="m" * c.MAX_MACHINE_NAME)
    assert decode_configuration(encode_configuration((at, 0))) == (at, 0)
    with pytest.raises(ValueError, match="machine name"):
        section.encode_configuration(section.Configuration(machine=at.machine + "m"))
    over = b"\7" + fields.be32(257) + bytes(258)
    with pytest.raises(StreamError, match="machine name is too large"):
        decode_configuration(over)


def test_capability_limit():
    def wire(count: int) -> bytes:
        listed = fields.be32(count) + count * fields.name("x")
        return configuration_with(subsection(c.CONFIGURATION_CAPABILITIES, listed))

    found, _ = decode_configuration(wire(c.MAX_CAPABILITIES))
    assert len(found.capabilities) == c.MAX_CAPABILITIES
    with pytest.raises(StreamError, match="number of capabilities"):
        decode_configuration(wire(c.MAX_CAPABILITIES + 1))


def test_block_count_limit():
    entries = [(f"b{index}", 4096) for index in range(c.MAX_BLOCKS)]
    assert len(decode_setup(setup(*entries))) == c.MAX_BLOCKS
    with pytest.raises(StreamError, match="number of RAM blocks"):
        decode_setup(setup(*entries, ("more", 4096)))


def test_ram_size_limit():
    assert decode_setup(setup(("a", c.MAX_RAM_BYTES)))
    with pytest.raises(StreamError, match="RAM is too large"):
        decode_setup(setup(("a", c.MAX_RAM_BYTES + 4096)))


def test_device_state_limit():
    asked = []

    def read(size: int) -> bytes:
        asked.append(size)
        return fields.be32(c.MAX_DEVICE_STATE + 1) if size == 4 else b""

    with pytest.raises(StreamError, match="device state is too large"):
        section.read_device_state_untrusted(read)
    assert asked == [4]


@pytest.mark.parametrize("length", [0, 4097])
def test_encoding_a_block_needs_whole_pages(length):
    with pytest.raises(ValueError, match="whole pages"):
        section.encode_ram_setup([block("a", length)])


def test_encoding_what_does_not_fit():
    with pytest.raises(ValueError, match="fit"):
        section.encode_footer(2**32)
    with pytest.raises(ValueError, match="fit"):
        section.encode_timer(section.Timer(2**63, 0))
    with pytest.raises(ValueError, match="run state"):
        section.encode_globalstate(section.GlobalState("x" * 32))
