"""What can be told of a guest that nobody here knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, foreign, section

SIZES = st.sampled_from([None, 2 << 20, 1 << 30])
BLOCKS = st.lists(
    st.builds(
        lambda name, pages, size: section.BlockEntry(
            idstr=name, length=pages * (size or 4096), page_size=size
        ),
        st.text("abc./@", min_size=1, max_size=40),
        st.integers(1, 1000),
        SIZES,
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda block: block.idstr,
).map(tuple)


def full(name: str, body: bytes, section_id: int = 5) -> bytes:
    header = section.Full(section_id=section_id, name=name, instance=0, version=1)
    return section.encode_section(header, body)


def globalstate(word: str, section_id: int = 5) -> bytes:
    return full(
        "globalstate",
        section.encode_globalstate(section.GlobalState(word)),
        section_id,
    )


# --- the block list ------------------------------------------------------------


@given(BLOCKS)
def test_page_sizes_are_where_they_are_listed(
    blocks: tuple[section.BlockEntry, ...],
) -> None:
    read = fields.over(section.encode_ram_setup(blocks) + b"more")
    assert foreign.read_ram_setup_untrusted(read, advised=True) == blocks
    assert read(4) == b"more"


def test_without_advise_there_are_none() -> None:
    blocks = (section.BlockEntry(idstr="a", length=8192),)
    read = fields.over(section.encode_ram_setup(blocks))
    assert foreign.read_ram_setup_untrusted(read, advised=False) == blocks


@given(BLOCKS, st.data())
def test_any_cut_is_an_error(
    blocks: tuple[section.BlockEntry, ...], data: st.DataObject
) -> None:
    wire = section.encode_ram_setup(blocks)
    size = data.draw(st.integers(0, len(wire) - 1))
    with pytest.raises(StreamError):
        foreign.read_ram_setup_untrusted(fields.over(wire[:size]), advised=True)


@given(BLOCKS, st.data())
def test_any_change_is_an_error_or_another_list(
    blocks: tuple[section.BlockEntry, ...], data: st.DataObject
) -> None:
    wire = bytearray(section.encode_ram_setup(blocks))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] = data.draw(st.integers(0, 255))
    try:
        found = foreign.read_ram_setup_untrusted(fields.over(bytes(wire)), advised=True)
    except StreamError:
        return
    assert all(block.length % (block.page_size or 4096) == 0 for block in found)


@pytest.mark.parametrize("size", [3 << 20, 4097, 1 << 53])
def test_pages_of_an_odd_size(size: int) -> None:
    wire = fields.be64((6 << 20) | c.RAM_SAVE_FLAG_MEM_SIZE)
    wire += fields.name("a") + fields.be64(6 << 20) + fields.be64(size)
    with pytest.raises(StreamError, match="odd size"):
        foreign.read_ram_setup_untrusted(fields.over(wire), advised=True)


def test_a_block_of_half_a_page() -> None:
    blocks = (section.BlockEntry(idstr="a", length=3 << 20, page_size=2 << 20),)
    wire = section.encode_ram_setup(blocks)
    with pytest.raises(StreamError, match="whole pages"):
        foreign.read_ram_setup_untrusted(fields.over(wire), advised=True)


# --- sections ------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_end_of_a_section(body: bytes) -> None:
    one, part = full("device", body), b"\x02" + fields.be32(1)
    found = foreign.end_of_section_untrusted(one + part, 1)
    false = section.encode_footer(5)
    assert found == len(one) or false in body
    for size in range(len(one) + 5):
        early = foreign.end_of_section_untrusted((one + part)[:size], 1)
        assert early is None or false in body


def test_run_state() -> None:
    device = full("device", b"\x0bglobalstate" + bytes(7) + b"\1 but not really")
    assert foreign.run_state_untrusted(device) is None
    assert foreign.run_state_untrusted(b"") is None
    both = globalstate("running") + device + globalstate("paused") + device
    assert foreign.run_state_untrusted(both) == "paused"
    assert foreign.run_state_untrusted(both[:200]) == "running"


def test_the_end_of_device_sections() -> None:
    ends = full("device", b"x") + globalstate("running", 77)
    assert foreign.ends_with_globalstate_untrusted(ends)
    assert foreign.ends_with_section_untrusted(ends)
    other = ends + full("device", b"x")
    assert not foreign.ends_with_globalstate_untrusted(other)
    assert foreign.ends_with_section_untrusted(other)
    for size in range(len(ends)):
        assert not foreign.ends_with_globalstate_untrusted(ends[:size])
    assert not foreign.ends_with_section_untrusted(ends[:-1])
    assert not foreign.ends_with_section_untrusted(section.encode_footer(9))
