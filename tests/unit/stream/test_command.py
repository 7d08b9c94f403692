"""Commands: round trips, the splitting of discards, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import decode_command, hexed

from common.errors import StreamError
from common.stream import command, fields
from common.stream import constants as c

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60)
be32s = st.integers(0, 2**32 - 1)
be64s = st.integers(0, 2**64 - 1)
pages = st.integers(1, 2**30).map(lambda page: page * c.TARGET_PAGE_SIZE)
ranges = st.lists(st.tuples(pages, pages), min_size=1, max_size=40)

commands = st.one_of(
    st.sampled_from(
        [
            command.OpenReturnPath(),
            command.AdviseEmpty(),
            command.Listen(),
            command.Run(),
            command.Resume(),
            command.SwitchoverStart(),
        ]
    ),
    st.builds(command.Ping, be32s),
    st.builds(command.Advise, be64s, be64s),
    st.builds(command.RamDiscard, names, ranges.map(tuple)),
    st.builds(command.Packaged, st.integers(0, c.MAX_PACKAGE)),
    st.builds(command.RecvBitmap, names),
    st.builds(
        command.Layout,
        names,
        st.integers(0, c.MAX_RAM_BYTES // c.LAYOUT_CHUNK),
        st.binary(min_size=1, max_size=100),
    ),
)


@given(commands)
def test_round_trip(value):
    assert decode_command(command.encode(value)) == value


@given(ranges)
def test_discards_are_split_as_qemu_does(every):
    split = list(command.discards("ram", every))
    assert [span for one in split for span in one.ranges] == every
    assert all(len(one.ranges) == c.MAX_DISCARDS_PER_COMMAND for one in split[:-1])
    assert 1 <= len(split[-1].ranges) <= c.MAX_DISCARDS_PER_COMMAND


def test_nothing_to_discard_is_no_command():
    assert list(command.discards("ram", [])) == []


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        ("08 00 00 00 00", "unknown command"),
        ("08 50 43 00 0b 00 01 61 0000000000000000", "wrong length"),
        ("08 50 43 00 0c 01 01 61 0000000000000000 02", "layout version"),
        ("08 50 43 00 0c 00 01 61 ffffffffffffffff 02", "first chunk"),
        ("08 50 43 00 0c 00 02 6161 0000000000000000", "without chunks"),
        ("08 00 08 00 00", "unknown command"),  # ENABLE_COLO
        ("08 00 0c 00 00", "unknown command"),
        ("08 00 01 00 01 00", "wrong length"),
        ("08 00 02 00 03 00 00 01", "wrong length"),
        ("08 00 02 00 05 00 00 00 00 01", "wrong length"),
        ("08 00 03 00 08 00 00 00 00 00 00 10 00", "wrong length"),
        ("08 00 0a 00 03 01 61 61", "end of command"),
        ("08 00 0a 00 02 02 61", "ends early"),
        ("08 00 06 00 04 00 01 61 00", "wrong length"),
    ],
)
def test_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        decode_command(hexed(wire))


def discard(*spans: tuple[int, int], version: int = 0, end: int = 0) -> bytes:
    payload = bytes([version]) + fields.name("ram") + bytes([end])
    payload += b"".join(fields.be64(at) + fields.be64(size) for at, size in spans)
    return b"\x08\0\x06" + fields.be16(len(payload)) + payload


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (discard((0, 4096), version=1), "version"),
        (discard((0, 4096), end=1), "end of a block name"),
        (discard((1, 4096)), "whole pages"),
        (discard((0, 1)), "whole pages"),
        (discard((0, 0)), "whole pages"),
        (discard((2**64 - 4096, 4096)), "too large"),
    ],
)
def test_discard_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        decode_command(wire)


def test_discard_of_broken_ranges():
    wire = discard((0, 4096), (0, 4096))
    with pytest.raises(StreamError, match="whole ranges"):
        decode_command(wire[:4] + bytes([wire[4] - 1]) + wire[5:-1])


def test_thousand_ranges_in_one_command():
    """QEMU accepts that many, so whoever writes them may."""
    spans = tuple((page * 8192, 4096) for page in range(1000))
    assert decode_command(discard(*spans)) == command.RamDiscard("ram", spans)


def test_package_limit():
    at = command.Packaged(c.MAX_PACKAGE)
    assert decode_command(command.encode(at)) == at
    with pytest.raises(ValueError, match="too large"):
        command.encode(command.Packaged(c.MAX_PACKAGE + 1))
    wire = b"\x08\0\7\0\4" + fields.be32(c.MAX_PACKAGE + 1)
    with pytest.raises(StreamError, match="package is too large"):
        decode_command(wire)


def test_an_empty_discard_cannot_be_said():
    with pytest.raises(ValueError, match="at least one"):
        command.encode(command.RamDiscard("ram", ()))
