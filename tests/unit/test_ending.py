"""The end of a stream with sections that only the description can tell apart."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.channel import Channel
from common.errors import ChannelLost, StreamError
from common.stream import constants as c
from common.stream import fields, section, vmdesc
from dstd import ending
from dstd.ending import receive_early_untrusted, receive_ending_untrusted

if TYPE_CHECKING:
    from collections.abc import Iterator

# A body full of what looks like the end, so that every "}" is a candidate.
BODY = b"\0\x06\0\0\0\x02{}\0\x06\0\0\0\x01}" * 3
DEVICES = (
    vmdesc.device_state("first", 1, 2),
    vmdesc.device_state("second", 1, len(BODY)),
)


def stream() -> bytes:
    sections = [
        section.encode_section(
            section.Full(section_id=n, name=name, instance=0, version=1),
            section.encode_device_state(body),
        )
        for n, (name, body) in enumerate([("first", b"}}"), ("second", BODY)])
    ]
    description = vmdesc.encode(vmdesc.describe(DEVICES))
    return b"".join(sections) + section.EOF + description


def device_sections() -> bytes:
    data = stream()
    return data[: data.rindex(section.EOF + b"\x06")]


@contextmanager
def connected() -> Iterator[tuple[Channel, socket.socket]]:
    """What is sent in one piece is received in one piece."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        channel = Channel(ours.detach(), "main")
        try:
            yield channel, theirs
        finally:
            channel.close()


async def test_any_pieces() -> None:
    """Cut at every byte: the end is found when it is there, and not before."""
    data = stream()
    for cut in range(2, len(data)):
        with connected() as (channel, theirs):
            theirs.send(data[1:cut])
            theirs.send(data[cut:])
            found = await receive_ending_untrusted(channel, data[:1])
        assert [s.header.name for s in found.sections] == ["first", "second"]
        assert found.sections[1].body[4:] == BODY


async def test_no_description() -> None:
    with connected() as (channel, theirs):
        theirs.send(stream()[:-1])
        theirs.close()
        with pytest.raises(StreamError, match="without the description"):
            await receive_ending_untrusted(channel, b"")


GLOBALSTATE = section.encode_section(
    section.Full(section_id=7, name="globalstate", instance=0, version=1),
    section.encode_globalstate(section.GlobalState("paused")),
)


async def test_closed_behind_eof() -> None:
    """As much as a source says that was told to send no description."""
    sections = device_sections()
    with connected() as (channel, theirs):
        theirs.send(sections + section.EOF)
        theirs.close()
        found = await receive_ending_untrusted(channel, b"")
    assert found.area == sections
    assert found.text is None
    assert found.sections == ()


@pytest.mark.parametrize("cut", range(1, 8))
async def test_closed_in_front_of_eof(cut: int) -> None:
    with connected() as (channel, theirs):
        theirs.send((GLOBALSTATE + section.EOF)[:-cut])
        theirs.close()
        with pytest.raises(StreamError, match="without the description"):
            await receive_ending_untrusted(channel, b"")


async def test_silence_behind_eof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source waits for SHUT: its channel stays open, and of use."""
    monkeypatch.setattr(ending, "SILENCE_SECONDS", 0.01)
    with connected() as (channel, theirs):
        theirs.send(GLOBALSTATE + section.EOF)
        found = await receive_ending_untrusted(channel, b"")
        assert found.area == GLOBALSTATE
        await channel.write(b"SHUT")
        assert theirs.recv(4) == b"SHUT"


async def test_early_sections_are_described_first() -> None:
    data = stream()
    end = data.index(b"\x04", 20)
    early, rest = data[:end], data[end:]
    with connected() as (channel, theirs):
        theirs.send(rest)
        found = await receive_ending_untrusted(channel, b"", early)
    assert [s.header.name for s in found.sections] == ["first", "second"]
    assert early + found.area == device_sections()


RAM = 3
EARLY = section.encode_section(
    section.Full(section_id=9, name="virtio-mem", instance=0, version=1),
    b"\x7e\0\0\0\x09 looks like a footer \x7e\0\0\0\x09\x02\0\0\0\x04",
)


@pytest.mark.parametrize(
    "behind",
    [
        b"\x02" + fields.be32(RAM),
        b"\x03" + fields.be32(RAM),
        b"\x08\0\x0b\0\0",
        EARLY,
    ],
)
async def test_an_early_section(behind: bytes) -> None:
    """In any pieces; what follows stays to be read."""
    for cut in range(2, len(EARLY + behind)):
        with connected() as (channel, theirs):
            theirs.send((EARLY + behind)[1:cut])
            theirs.send((EARLY + behind)[cut:])
            found = await receive_early_untrusted(channel, EARLY[:1], RAM)
            assert found == EARLY
            assert await channel.decode(lambda read: read(5)) == behind[:5]


async def test_an_early_section_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "MAX_EARLY", 300)
    with connected() as (channel, theirs):
        theirs.send(EARLY[1:] + bytes(400))
        with pytest.raises(StreamError, match="too large"):
            await receive_early_untrusted(channel, bytes([c.QEMU_VM_SECTION_FULL]), RAM)


async def test_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream()
    monkeypatch.setattr(ending, "MAX_ENDING", len(data) - 1)
    with connected() as (channel, theirs):
        theirs.send(data)
        with pytest.raises(StreamError, match="too large"):
            await receive_ending_untrusted(channel, b"")


async def test_broken_connection() -> None:
    """A reset is no end of the stream: in precopy the two are different errors."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as theirs:
        ours, _ = listener.accept()
        channel = Channel(ours.detach(), "main")
        linger = b"\1\0\0\0\0\0\0\0"
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        theirs.close()
        with pytest.raises(ChannelLost, match="ECONNRESET"):
            await receive_ending_untrusted(channel, b"")
        channel.close()
