"""The description: what we write, the lengths in it, the walk to the footers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import ENDING, RUNNING, full

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, section, vmdesc

GLOBALSTATE_SECTION = section.encode_section(
    full(3, "globalstate"), section.encode_globalstate(RUNNING)
)


def lengths(*devices: dict[str, object]) -> list[int]:
    text = json.dumps({"page_size": 4096, "devices": list(devices)}).encode()
    return [device.length for device in vmdesc.lengths_untrusted(text)]


def device(fields: object = (), **more: object) -> dict[str, object]:
    return {"name": "d", "instance_id": 0, "fields": fields, **more}


# --- What we write -----------------------------------------------------------


def test_document():
    text = vmdesc.describe([vmdesc.GLOBALSTATE, vmdesc.device_state("microvm", 7, 99)])
    document = json.loads(text)
    assert document["page_size"] == 4096
    assert [entry["name"] for entry in document["devices"]] == [
        "globalstate",
        "microvm",
    ]
    for entry in document["devices"]:
        assert entry.keys() >= {"name", "instance_id", "version", "fields"}
        assert all(
            field.keys() == {"name", "type", "size"} for field in entry["fields"]
        )


def test_lengths_are_those_of_the_encoders():
    state = section.encode_device_state(bytes(99))
    text = vmdesc.describe([vmdesc.GLOBALSTATE, vmdesc.device_state("microvm", 7, 99)])
    assert vmdesc.lengths_untrusted(text) == (
        vmdesc.Described("globalstate", 0, section.GLOBALSTATE_SIZE),
        vmdesc.Described("microvm", 0, len(state)),
    )


def found_as_the_analyser_does(stream: bytes) -> bytes:
    """The last zero byte, then the first brace, and 06 five bytes before that."""
    at = stream.find(b"{", stream.rfind(b"\0"))
    assert stream[at - 5] == c.QEMU_VM_VMDESCRIPTION
    return stream[at : at + int.from_bytes(stream[at - 4 : at], "big")]


@pytest.mark.parametrize("name", ["n" * size for size in range(1, 160, 3)])
def test_analyser_finds_the_text(name):
    """Texts of many lengths, some of which would have the byte of a brace."""
    text = vmdesc.describe([vmdesc.device_state(name, 1, 5)])
    assert 0x7B not in fields.be32(len(text))
    assert found_as_the_analyser_does(section.EOF + vmdesc.encode(text)) == text


def test_some_of_those_lengths_had_to_be_avoided():
    texts = [
        vmdesc.describe([vmdesc.device_state("n" * n, 1, 5)]) for n in range(1, 160)
    ]
    assert any(text.endswith(b" ") for text in texts)


# --- The frame ---------------------------------------------------------------


@given(st.binary(max_size=50))
def test_frame(text):
    wire = vmdesc.encode(text)
    assert wire[0] == c.QEMU_VM_VMDESCRIPTION
    assert vmdesc.read_untrusted(fields.over(wire[1:])) == text


def test_empty_frame_is_what_qemu_needs_at_least():
    assert vmdesc.encode(b"") == b"\6\0\0\0\0"


def test_frame_limit():
    at = bytes(c.MAX_VMDESC)
    assert vmdesc.read_untrusted(fields.over(vmdesc.encode(at)[1:])) == at
    with pytest.raises(ValueError, match="too large"):
        vmdesc.encode(at + b"x")
    with pytest.raises(StreamError, match="description is too large"):
        vmdesc.read_untrusted(fields.over(fields.be32(c.MAX_VMDESC + 1)))


# --- Lengths -----------------------------------------------------------------


def test_fields_and_arrays():
    listed = [
        {"name": "a", "type": "uint32", "size": 4},
        {"name": "b", "type": "uint64", "size": 8, "array_len": 3},
        {"name": "c", "type": "uint8", "size": 1, "index": 0},
        {"name": "c", "type": "uint8", "size": 1, "index": 1},
        {"name": "e", "type": "buffer", "size": 0},
        {"name": "f", "type": "uint8", "size": 1, "array_len": 0},
    ]
    assert lengths(device(listed)) == [4 + 24 + 2]


def test_a_struct_already_counts_what_it_nests():
    nested = {"vmsd_name": "s", "version": 1, "fields": [{"name": "x", "size": 9}]}
    assert lengths(device([{"name": "s", "size": 9, "struct": nested}])) == [9]


def test_subsections_of_subsections():
    inner = {"vmsd_name": "d/in/er", "version": 1, "fields": [{"name": "x", "size": 2}]}
    outer = {
        "vmsd_name": "d/in",
        "version": 1,
        "fields": [{"name": "y", "size": 3}],
        "subsections": [inner],
    }
    whole = device([{"name": "z", "size": 1}], subsections=[outer, outer])
    assert lengths(whole) == [1 + 2 * (6 + 4 + 3 + 6 + 7 + 2)]


def test_the_old_form():
    old = {
        "name": "slirp",
        "instance_id": 0,
        "size": 12,
        "fields": [{"name": "data", "type": "buffer", "size": 12}],
    }
    assert lengths(old) == [12]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'"devices"',
        b"[" * 100_000,
        b'{"devices":{}}',
        b'{"devices":[1]}',
        b'{"devices":[{}]}',
        b'{"devices":[{"name":"d"}]}',
        b'{"devices":[{"name":"d","instance_id":-1}]}',
        b'{"devices":[{"name":"d","instance_id":true}]}',
        b'{"devices":[{"name":"d","instance_id":0,"fields":[{"size":1.5}]}]}',
        b'{"devices":[{"name":"d","instance_id":0,"fields":[{"size":NaN}]}]}',
        b'{"devices":[{"name":"d","instance_id":0,"fields":[{}]}]}',
        b'{"devices":[{"name":"d","instance_id":0,"fields":"no"}]}',
        b'{"devices":[{"name":"d","instance_id":0,"subsections":[[]]}]}',
        b'{"x":' + b"9" * 5000 + b"}",
    ],
)
def test_refused(text):
    with pytest.raises(StreamError, match="description"):
        vmdesc.lengths_untrusted(text)


def test_deep_subsections():
    """As deep as JSON goes, and without our own recursion."""
    part: dict[str, object] = {"vmsd_name": "", "fields": []}
    for _ in range(200):
        part = {"vmsd_name": "", "fields": [], "subsections": [part]}
    assert lengths(device(**{"subsections": [part]})) == [201 * 6]


# --- The walk ----------------------------------------------------------------

DESCRIBED = (vmdesc.Described("globalstate", 0, 104),)


@pytest.mark.parametrize(
    ("area", "described"),
    [
        (GLOBALSTATE_SECTION, ()),
        (b"", DESCRIBED),
        (GLOBALSTATE_SECTION + b"\0", DESCRIBED),
        (GLOBALSTATE_SECTION, (vmdesc.Described("globalstate", 0, 103),)),
        (GLOBALSTATE_SECTION, (vmdesc.Described("globalstate", 0, 2**70),)),
        (GLOBALSTATE_SECTION, (vmdesc.Described("globalstate", 1, 104),)),
        (GLOBALSTATE_SECTION, (vmdesc.Described("timer", 0, 104),)),
        (b"\2\0\0\0\1" + GLOBALSTATE_SECTION, DESCRIBED),
    ],
)
def test_walk_refused(area, described):
    with pytest.raises(StreamError) as caught:
        vmdesc.walk_untrusted(area, described)
    assert caught.value.offset is not None


def test_walk():
    (found,) = vmdesc.walk_untrusted(GLOBALSTATE_SECTION, DESCRIBED)
    assert found.header == full(3, "globalstate")
    assert found.body == section.encode_globalstate(RUNNING)


def test_ending_is_found_as_soon_as_it_is_there_and_not_before():
    for size in range(len(ENDING.wire)):
        assert vmdesc.split_ending_untrusted(ENDING.wire[:size]) is None
    assert vmdesc.split_ending_untrusted(ENDING.wire) == ENDING.value
    assert vmdesc.split_ending_untrusted(ENDING.wire + b"x") is None


def test_device_state_that_looks_like_an_ending():
    """A footer and a whole false trailer in the state, as guests may well have."""
    false = b"\x7e\0\0\0\4" + b"\0\6\0\0\0\2{}"
    state = section.encode_device_state(false * 3)
    text = vmdesc.describe([vmdesc.device_state("d", 1, len(state) - 4)])
    tail = (
        section.encode_section(full(4, "d"), state) + section.EOF + vmdesc.encode(text)
    )
    for size in range(len(tail)):
        assert vmdesc.split_ending_untrusted(tail[:size]) is None
    ending = vmdesc.split_ending_untrusted(tail)
    assert ending is not None
    assert ending.sections[0].body == state


def test_a_tail_full_of_false_endings():
    """Every candidate has the right length; one copy for each would take minutes."""
    lengths = range(1 + 7 * 99_999, 0, -7)
    tail = b"".join(b"\0\6" + fields.be32(length) + b"{" for length in lengths)
    assert vmdesc.split_ending_untrusted(tail) is None
