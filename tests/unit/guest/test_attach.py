"""The attach messages: what is taken, what is refused, and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.attach_samples import ATTACH, BLOCK, SAMPLES, Sample, changed, packed

from common.guest import attach
from common.guest.attach import AttachError, Event, Failure, Return, decode_untrusted
from common.guest.base import Device, GuestState

ALL = {sample.name: sample for sample in SAMPLES}


def decode(message: object, descriptors: int = 0) -> attach.FromGuest:
    return decode_untrusted(packed(message), descriptors)


def refusal(members: dict[str, Any], descriptors: int = 3) -> str:
    with pytest.raises(AttachError) as error:
        decode({"attach": members}, descriptors)
    return str(error.value)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ATTACH.items() if key != name}


# --- what is taken ----------------------------------------------------------------


def test_attach() -> None:
    assert decode({"attach": ATTACH}, 3) == attach.Attach(
        machine="postcopyd-1",
        device=Device(name="microvm", version=1),
        state=GuestState.RUNNING,
        pid=4711,
        vcpus=(4712, 4713),
        blocks=(
            attach.Block(
                idstr="ram",
                length=BLOCK["length"],
                page_size=4096,
                base=BLOCK["base"],
                guest_address=0,
            ),
        ),
        descriptors=("userfaultfd", "pagemap", "block:ram"),
        no_userfaultfd=None,
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vcpus", []),
        ("vcpus", [1] * attach.MAX_VCPUS),
        ("state", "paused"),
        ("state", "incoming"),
        ("machine", "m" * 255),
        ("device.name", "a" * 64),
        ("device.version", (1 << 32) - 1),
        ("blocks.0.page-size", 2 << 20),
        ("blocks.0.length", attach.MAX_ADDRESS),
        ("blocks.0.guest-address", attach.MAX_ADDRESS),
        ("descriptors", ["block:ram", "userfaultfd", "keep:abilities"]),
        ("unheard-of", {"members": "are ignored"}),
    ],
)
def test_attach_takes(path: str, value: object) -> None:
    assert isinstance(decode({"attach": changed(path, value)}, 3), attach.Attach)


def test_attach_without_device() -> None:
    taken = decode({"attach": without("device")}, 3)
    assert isinstance(taken, attach.Attach)
    assert taken.device is None


def test_attach_without_userfaultfd() -> None:
    sample = ALL["attach without userfaultfd"]
    taken = decode_untrusted(sample.packet, sample.descriptors)
    assert isinstance(taken, attach.Attach)
    assert taken.no_userfaultfd == "set vm.unprivileged_userfaultfd=1"
    assert taken.descriptors == ("pagemap", "block:ram")


def test_blocks_at_the_limit() -> None:
    names = [f"b{number}" for number in range(attach.MAX_BLOCKS)]
    blocks = [{**BLOCK, "idstr": name} for name in names]
    labels = ["userfaultfd", *(f"block:{name}" for name in names)]
    taken = decode({"attach": ATTACH | {"blocks": blocks, "descriptors": labels}}, 65)
    assert isinstance(taken, attach.Attach)
    assert [block.idstr for block in taken.blocks] == names


def test_answers_and_events() -> None:
    assert decode({"return": {}, "id": 7}) == Return(id=7, value={}, descriptors=())
    assert decode(
        {"return": {"length": 8}, "id": 1, "descriptors": ["state"]}, 1
    ) == Return(id=1, value={"length": 8}, descriptors=("state",))
    assert decode({"error": "no", "id": 0}) == Failure(id=0, text="no")
    assert decode({"event": "shutdown"}) == Event(name="shutdown", data={})
    most = (1 << 63) - 1
    assert decode({"error": "no", "id": most}) == Failure(id=most, text="no")


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ATTACH))
def test_attach_needs(name: str) -> None:
    if name == "device":
        return
    what = "descriptors" if name == "descriptors" else name
    assert what in refusal(without(name))


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("version", 2, "protocol version 2 is not supported, version 1 is"),
        ("version", "1", "version must be an integer"),
        ("version", True, "version must be an integer"),
        ("version", 1.0, "version must be an integer"),
        ("version", 10**4000, "number out of range"),
        ("machine", "", "machine must be a string of 1 to 255 bytes"),
        ("machine", "m" * 256, "machine must be a string of 1 to 255 bytes"),
        ("machine", "ü" * 128, "machine must be a string of 1 to 255 bytes"),
        ("machine", "a\nb", "machine must be printable"),
        ("machine", "a\ud800", "not a valid Unicode character"),
        ("machine", None, "machine must be a string"),
        ("device", "microvm", "device must be an object"),
        ("device.name", "micro vm", "device name may hold"),
        ("device.name", "müvm", "device name may hold"),
        ("device.name", "UPPER", "device name may hold"),
        ("device.name", "a" * 65, "name must be a string of 1 to 64 bytes"),
        ("device.version", 0, "version must be 1 to 4294967295: 0"),
        ("device.version", 1 << 32, "version must be 1 to 4294967295"),
        ("state", "asleep", "state must be one of running, paused, incoming: 'asleep'"),
        ("state", 1, "state must be a string"),
        ("pid", 0, "pid must be 1 to"),
        ("pid", -1, "pid must be 1 to"),
        ("pid", (1 << 31) + 1, "pid must be 1 to"),
        ("vcpus", {}, "vcpus must be an array of at most 256"),
        ("vcpus", [1] * 257, "vcpus must be an array of at most 256"),
        ("vcpus", ["1"], "vcpus must be an integer"),
        ("vcpus", [0], "vcpus must be 1 to"),
        ("blocks", [], "a guest needs at least one RAM block"),
        ("blocks", [BLOCK] * 65, "blocks must be an array of at most 64"),
        ("blocks", [BLOCK, BLOCK], "two RAM blocks have the same idstr"),
        ("blocks", BLOCK, "blocks must be an array"),
        ("blocks.0", "ram", "blocks must be an object"),
        ("blocks.0.idstr", "", "idstr must be a string of 1 to 255 bytes"),
        ("blocks.0.idstr", "a\0b", "idstr must be printable"),
        ("blocks.0.length", 0, "length must be 1 to"),
        ("blocks.0.length", -4096, "length must be 1 to"),
        ("blocks.0.length", 4097, "block 'ram': length and base must be whole pages"),
        ("blocks.0.length", attach.MAX_ADDRESS + 4096, "length must be 1 to"),
        ("blocks.0.base", 0, "base must be 1 to"),
        ("blocks.0.base", 4097, "block 'ram': length and base must be whole pages"),
        ("blocks.0.page-size", 8192, "page-size must be 4096 or 2097152"),
        ("blocks.0.page-size", None, "page-size must be an integer"),
        ("blocks.0.guest-address", -1, "guest-address must be 0 to"),
        ("descriptors", {}, "descriptors must be an array"),
        ("descriptors", ["x"] * 129, "descriptors must be an array of at most 128"),
        (
            "descriptors",
            ["userfaultfd", "block:ram"],
            "2 descriptors are named, 3 came",
        ),
        ("descriptors", [1, 2, 3], "3 descriptors are named, 3 came"),
        ("descriptors", ["block:ram"] * 3, "two descriptors have the same name"),
        (
            "descriptors",
            ["pagemap", "block:ram", "keep:a"],
            "the descriptor 'userfaultfd' is missing",
        ),
        (
            "descriptors",
            ["userfaultfd", "pagemap", "keep:a"],
            "the descriptor 'block:ram' is missing",
        ),
        (
            "descriptors",
            ["userfaultfd", "block:ram", "block:rom"],
            "the descriptor 'block:rom' is not known",
        ),
        ("no-userfaultfd", "", "no-userfaultfd must be a string of 1 to 4096 bytes"),
        ("no-userfaultfd", "two\nlines", "no-userfaultfd must be printable"),
    ],
)
def test_attach_refuses(path: str, value: object, text: str) -> None:
    assert text in refusal(changed(path, value))


def test_userfaultfd_beside_the_reason_for_none() -> None:
    text = refusal(ATTACH | {"no-userfaultfd": "it is not permitted"})
    assert text == "the descriptor 'userfaultfd' is not known"


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (b"", "not JSON: 0 JSON texts in one packet, expected 1"),
        (b"{", "not JSON"),
        (b"{}{}", "not JSON: 2 JSON texts in one packet, expected 1"),
        (b"\xff\xfe", "not JSON"),
        (b"{'event': NaN}", "not JSON"),
        (b"[" * 2000, "not JSON"),
        (b"[]", "the message must be an object"),
        (b"null", "the message must be an object"),
        (b"{}", "no attach, return, error or event"),
        (b'{"request": "stop", "id": 1}', "no attach, return, error or event"),
        (b'{"attach": []}', "attach must be an object"),
        (b'{"event": 1}', "event must be a string"),
        (b'{"event": "shutdown", "data": []}', "data must be an object"),
        (b'{"event": "' + b"e" * 65 + b'"}', "event must be a string of 1 to 64"),
        (b'{"return": []}', "id must be an integer"),
        (b'{"return": [], "id": 1}', "return must be an object"),
        (b'{"return": {}, "id": -1}', "id must be 0 to"),
        (b'{"return": {}, "id": 9223372036854775808}', "id must be 0 to"),
        (b'{"error": "no"}', "id must be an integer"),
        (b'{"error": 5, "id": 1}', "error must be a string"),
        (b'{"error": "no", "id": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"return": {}, "id": 1, "descriptors": ["state"]}', "1 descriptors are"),
        (b" " * (attach.MAX_PACKET + 1), "a message of more than 65536 bytes"),
    ],
)
def test_message_refused(packet: bytes, text: str) -> None:
    with pytest.raises(AttachError) as error:
        decode_untrusted(packet, 0)
    assert text in str(error.value)


def test_packet_at_the_limit() -> None:
    packet = packed({"event": "hello"})
    packet += b" " * (attach.MAX_PACKET - len(packet))
    assert decode_untrusted(packet, 0) == Event(name="hello", data={})


# --- any bytes ------------------------------------------------------------------------


def survives(packet: bytes, descriptors: int) -> None:
    """The contract: a record, or AttachError with a sentence that can be sent."""
    said = "taken"
    try:
        decode_untrusted(packet, descriptors)
    except AttachError as error:
        said = str(error)
    assert json.loads(attach.refused(said))["refused"]["reason"]


@pytest.mark.parametrize("sample", SAMPLES, ids=ALL)
def test_cut_anywhere(sample: Sample) -> None:
    for end in range(len(sample.packet)):
        with pytest.raises(AttachError):
            decode_untrusted(sample.packet[:end], sample.descriptors)


@given(
    sample=st.sampled_from(SAMPLES),
    at=st.integers(0, 1000),
    byte=st.integers(0, 255),
    descriptors=st.integers(0, 5),
)
def test_one_byte_changed(sample: Sample, at: int, byte: int, descriptors: int) -> None:
    broken = bytearray(sample.packet)
    broken[at % len(broken)] = byte
    survives(bytes(broken), descriptors)


@given(packet=st.binary(max_size=512), descriptors=st.integers(0, 128))
def test_any_bytes(packet: bytes, descriptors: int) -> None:
    survives(packet, descriptors)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    path=st.sampled_from(
        [*ATTACH, "device.name", *(f"blocks.0.{name}" for name in BLOCK)]
    ),
    value=ANYTHING | st.text(st.characters(categories=["Cs"])),
)
@example(path="pid", value=10**4000)
@example(path="device.name", value="\udfff")
def test_any_member(path: str, value: object) -> None:
    survives(packed({"attach": changed(path, value)}), 3)


# --- to the guest ---------------------------------------------------------------------


def test_what_the_daemon_says() -> None:
    assert json.loads(attach.attached()) == {"attached": {"version": 1}}
    assert json.loads(attach.refused("r" * 2000)) == {"refused": {"reason": "r" * 1024}}
    assert json.loads(attach.request("stop", 1, {}, ())) == {
        "request": "stop",
        "id": 1,
        "arguments": {},
    }
    assert json.loads(attach.request("keep", 2, {"name": "n"}, ["kept"])) == {
        "request": "keep",
        "id": 2,
        "arguments": {"name": "n"},
        "descriptors": ["kept"],
    }
