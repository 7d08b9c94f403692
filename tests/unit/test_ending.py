"""The end of a stream with sections that only the description can tell apart."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from common.channel import Channel
from common.errors import ChannelLost, StreamError
from common.stream import section, vmdesc
from dstd import ending
from dstd.ending import receive_ending_untrusted

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
