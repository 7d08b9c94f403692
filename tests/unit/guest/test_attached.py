"""Guests that take too long: on a clock that jumps when all wait."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.attach_samples import BLOCK, MIB

from common.errors import GuestError
from common.guest import attached
from common.guest.attach import Attach, decode_untrusted
from common.guest.attached import AttachedGuest
from common.guest.base import GuestState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    Ends = tuple[trio.socket.SocketType, trio.socket.SocketType]

HELLO = {
    "version": 1,
    "machine": "m",
    "state": "paused",
    "pid": 1,
    "vcpus": [],
    "blocks": [BLOCK | {"length": MIB}],
    "descriptors": ["block:ram"],
    "no-userfaultfd": "it is a test",
}


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, MIB)
    yield fd
    os.close(fd)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    """The daemon's end and the guest's."""
    pair = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for sock in pair:
        sock.close()


async def hear(sock: trio.socket.SocketType) -> Any:
    return json.loads(await sock.recv(65536))


async def test_silent_at_the_door(
    private_dir: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = str(private_dir / "guest")
    refusals = []

    async def wait_for_guest(listener: trio.socket.SocketType) -> None:
        await attached.accept(listener, incoming=True)

    with attached.listening(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_guest, listener)
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                await sock.connect(path)
                refusals.append(await hear(sock))
            nursery.cancel_scope.cancel()
    assert refusals == [{"refused": {"reason": "no message came in 30 s"}}]


def guest(sock: trio.socket.SocketType, ram: int) -> AttachedGuest:
    hello = decode_untrusted(json.dumps({"attach": HELLO}).encode(), 1)
    assert isinstance(hello, Attach)
    return AttachedGuest(sock, hello, {"block:ram": os.dup(ram)})


async def test_no_answer(
    autojump_clock: trio.testing.MockClock, ends: Ends, ram: int
) -> None:
    """The guest counts as lost, and its process sees that it is hung up on."""
    ours, theirs = ends
    attached_guest = guest(ours, ram)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attached_guest.listen)
        with pytest.raises(GuestError, match="did not answer stop in 30 s"):
            await attached_guest.stop()
        assert attached_guest.gone.is_set()
        with pytest.raises(GuestError, match="did not answer stop in 30 s"):
            await attached_guest.cont()
        assert (await hear(theirs))["request"] == "stop"
        assert await theirs.recv(1) == b""
    attached_guest.close()


async def test_answer_after_the_request_was_given_up(ends: Ends, ram: int) -> None:
    """It is dropped with its descriptors, and the next request gets its own."""
    ours, theirs = ends
    attached_guest = guest(ours, ram)
    reader, writer = os.pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attached_guest.listen)
        with trio.move_on_after(0.01):
            await attached_guest.save()
        late = {"return": {"length": 1}, "id": 1, "descriptors": ["state"]}
        await send(theirs, late, writer)
        os.close(writer)
        nursery.start_soon(attached_guest.cont)
        requests = [await hear(theirs), await hear(theirs)]
        assert [request["request"] for request in requests] == ["save", "cont"]
        await send(theirs, {"return": {}, "id": 2})
        # The last descriptor of the pipe's writing end is closed by now.
        assert await trio.to_thread.run_sync(os.read, reader, 1) == b""
        assert not attached_guest.gone.is_set()
        await send(theirs, {"return": {}, "id": 1})
        assert "nobody asked for" in (await hear(theirs))["refused"]["reason"]
    os.close(reader)
    assert attached_guest.state is GuestState.RUNNING
    attached_guest.close()


async def send(sock: trio.socket.SocketType, message: object, *fds: int) -> None:
    packet = json.dumps(message).encode()
    rights = array.array("i", fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
    await sock.sendmsg([packet], ancillary)
