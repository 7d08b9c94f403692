"""RAM records: the block that continues, offsets, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import PAGE, decode_record, hexed

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, ram

BLOCKS = {"ram": 64 * 4096, "rom": 4096, "vga": 16 * 4096}

places = st.sampled_from(sorted(BLOCKS)).flatmap(
    lambda block: st.tuples(
        st.integers(0, BLOCKS[block] // 4096 - 1).map(lambda page: page * 4096),
        st.just(block),
    )
)
contents = st.integers(0, 255).map(lambda byte: bytes([byte]) * 4096)
records = st.one_of(
    places.map(lambda place: ram.Zero(*place)),
    st.tuples(places, contents).map(lambda both: ram.Page(*both[0], both[1])),
    st.just(ram.Eos()),
)


def written(writer: ram.RecordWriter, record: ram.Record) -> bytes:
    match record:
        case ram.Zero(offset, block):
            return writer.zero(block, offset)
        case ram.Page(offset, block, data):
            return writer.page(block, offset, data)
    return ram.encode(record)


def read_all(wire: bytes) -> list[ram.Record]:
    source = fields.over(wire)
    reader = ram.RecordReader(source, BLOCKS)
    found = []
    while source.offset < len(wire):
        found.append(reader.next_untrusted())
    return found


@given(st.lists(records, max_size=30))
def test_writer_and_reader_agree(sequence):
    writer = ram.RecordWriter()
    assert read_all(b"".join(written(writer, one) for one in sequence)) == sequence


@given(st.lists(records, max_size=30))
def test_naming_every_block_is_as_good(sequence):
    assert read_all(b"".join(map(ram.encode, sequence))) == sequence


@given(st.lists(places, min_size=1, max_size=30))
def test_a_block_is_named_when_it_changes(sequence):
    writer = ram.RecordWriter()
    before = None
    for offset, block in sequence:
        record = decode_record(writer.zero(block, offset))
        assert record == ram.Zero(offset, None if block == before else block)
        before = block


def test_forgetting_names_the_block_again():
    writer = ram.RecordWriter()
    named = writer.zero("ram", 0)
    assert writer.zero("ram", 0) != named
    writer.forget()
    assert writer.zero("ram", 0) == named


def test_continue_holds_across_sections():
    writer = ram.RecordWriter()
    wire = (
        writer.zero("ram", 0)
        + ram.encode(ram.Eos())
        + ram.encode(ram.MultifdFlush())
        + writer.zero("ram", 4096)
    )
    assert read_all(wire)[-1] == ram.Zero(4096, "ram")


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        ("00 00 00 00 00 00 00 22 00", "does not name"),
        ("00 00 00 00 00 00 00 02 03 62 61 64 00", "unknown RAM block"),
        ("00 00 00 00 00 04 00 02 03 72 61 6d 00", "past the end"),
        ("ff ff ff ff ff ff f0 02 03 72 61 6d 00", "past the end"),
        ("00 00 00 00 00 00 00 02 03 72 61 6d 01", "fill byte"),
    ],
)
def test_page_refused(wire, complaint):
    reader = ram.RecordReader(fields.over(hexed(wire)), BLOCKS)
    with pytest.raises(StreamError, match=complaint):
        reader.next_untrusted()


def test_last_page_of_a_block():
    writer = ram.RecordWriter()
    assert read_all(writer.page("ram", 63 * 4096, PAGE)) == [
        ram.Page(63 * 4096, "ram", PAGE)
    ]


def test_a_refused_record_does_not_become_the_block_that_continues():
    wire = fields.be64(0x40000 | 2) + fields.name("ram") + b"\0" + fields.be64(0x22)
    reader = ram.RecordReader(fields.over(wire + b"\0"), BLOCKS)
    with pytest.raises(StreamError, match="past the end"):
        reader.next_untrusted()
    with pytest.raises(StreamError, match="does not name"):
        reader.next_untrusted()


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        ("00 00 00 00 00 10 00 60 01 00 04 00 02 cc a4", "XBZRLE"),
        ("00 00 00 00 00 10 00 40", "XBZRLE"),
        ("00 00 00 00 00 00 00 80", "RDMA"),
        ("00 00 00 00 00 00 01 00", "compressed"),
        ("00 00 00 00 00 00 00 00", "unknown kind"),
        ("00 00 00 00 00 00 00 01", "unknown kind"),
        ("00 00 00 00 00 00 00 0a", "unknown kind"),
        ("00 00 00 00 00 00 00 20", "unknown kind"),
        ("00 00 00 00 00 00 00 24", "unknown kind"),
        ("00 00 00 00 00 00 00 30", "unknown kind"),
        ("00 00 00 00 00 00 04 00", "unknown kind"),
        ("00 00 00 00 00 00 10 10", "unknown kind"),
        ("ff ff ff ff ff ff f0 04", "too large"),
    ],
)
def test_record_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        ram.read_untrusted(fields.over(hexed(wire)))


def test_flags_are_below_the_page_size():
    flags = [value for name, value in vars(c).items() if name.startswith("RAM_SAVE_")]
    assert len(flags) == len(set(flags)) == 9
    assert sum(flags) < c.TARGET_PAGE_SIZE


@pytest.mark.parametrize(
    "record",
    [ram.Zero(1, "ram"), ram.Page(0, "ram", b"short"), ram.MemSize(4097)],
)
def test_what_cannot_be_said(record):
    with pytest.raises(ValueError, match=r"page"):
        ram.encode(record)
