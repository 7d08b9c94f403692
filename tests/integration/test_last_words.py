"""The connection breaks around the last words of precopy: one side has the guest."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio
from support.inprocess import Pair, pair

from common import address
from common.guest.base import GuestState
from common.status import MigrationStatus as M
from common.stream import command, fields, returnpath, section
from common.stream import constants as c
from srcd import sections

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
PATIENCE = 20.0

OPEN = command.encode(command.OpenReturnPath())
HELLO = command.encode(command.Ping(c.PING_HELLO))
COMMIT = command.encode(command.Ping(c.PING_COMMIT))
COMPLETED = command.encode(command.Ping(c.PING_COMPLETED))


async def _stream(both: Pair, before_ram: bytes) -> bytes:
    """A whole precopy of empty RAM."""
    opening = sections.opening(
        both.source, return_path=False, postcopy=False, preempt=False
    )
    head = section.FILE_HEADER + section.encode_configuration(
        section.Configuration(machine=both.source.machine)
    )
    state = await sections.save_device_state(both.source, "running")
    return head + before_ram + opening.removeprefix(head) + state.ending()


async def _receive(both: Pair, speak: Callable[[socket.socket], None]) -> None:
    """Let `both.incoming` take a migration from a source that does just this."""
    path = str(both.source_file.with_name("socket"))
    await both.incoming.listen(address.Unix(path))

    def source() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(path)
            speak(sock)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.incoming.run)
            nursery.start_soon(trio.to_thread.run_sync, source)


def _hear(sock: socket.socket, wanted: returnpath.Message) -> None:
    def read(size: int) -> bytes:
        return sock.recv(size, socket.MSG_WAITALL)

    reader = fields.Reader(read)
    while returnpath.read_untrusted(reader) != wanted:
        pass


async def test_source_is_gone_when_it_has_committed() -> None:
    """It will never run the guest again, so it runs here."""
    with pair(MIB) as both:
        stream = await _stream(both, OPEN + HELLO)

        def speak(sock: socket.socket) -> None:
            sock.sendall(stream)
            _hear(sock, returnpath.Pong(c.PING_LOADED))
            # Nothing can be answered from here on.
            sock.shutdown(socket.SHUT_RD)
            sock.sendall(COMMIT)

        await _receive(both, speak)
        assert both.incoming.status.now is M.COMPLETED
        assert both.target.state is GuestState.RUNNING


async def test_source_is_gone_before_it_knows() -> None:
    """QEMU without SHUT goes on with its guest, so it must not run here."""
    with pair(MIB) as both:
        stream = await _stream(both, OPEN)

        def speak(sock: socket.socket) -> None:
            sock.shutdown(socket.SHUT_RD)
            sock.sendall(stream)

        await _receive(both, speak)
        assert both.incoming.status.now is M.FAILED
        assert both.target.state is not GuestState.RUNNING


@pytest.mark.parametrize("last", [b"", COMPLETED], ids=["dies", "says so"])
async def test_source_that_ends_with_the_last_word(last: bytes) -> None:
    """A srcd that died then ends its channel as if it had noted that word."""
    with pair(MIB) as both:
        stream = await _stream(both, OPEN + HELLO)

        def speak(sock: socket.socket) -> None:
            sock.sendall(stream)
            _hear(sock, returnpath.Pong(c.PING_LOADED))
            sock.sendall(COMMIT)
            _hear(sock, returnpath.Shut(0))
            sock.sendall(last)

        await _receive(both, speak)
        assert both.incoming.status.now is M.COMPLETED
        assert both.incoming.over == bool(last)


@pytest.mark.parametrize("capabilities", [(), ("postcopy-ram",)], ids=["pre", "post"])
async def test_a_source_says_that_it_has_noted_it(
    capabilities: tuple[str, ...],
) -> None:
    """Else the destination would wait for it to come back."""
    with pair(MIB, *capabilities) as both:
        if capabilities:
            both.outgoing.start_postcopy()
        await both.move()
        assert both.outgoing.status.now is M.COMPLETED
        assert both.incoming.over
