"""What the modelled link does to what is put into it."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from relay import LINKS, Lane, Link, Pipe

SLOW = Link(name="test", delay=0.5, rate=1000.0, chunk=100, buffer=10_000)


def pipe():
    ends = socket.socketpair()
    for end in ends:
        end.close()  # a lane does not touch them
    return Pipe(*ends)


def test_a_byte_leaves_at_the_rate_and_arrives_after_the_delay() -> None:
    lane = Lane(SLOW, SLOW.rate)
    lane.put(pipe(), bytes(100), now=10.0)
    assert lane.due == pytest.approx(10.6)
    assert not list(lane.take(10.59))
    assert [data for _, data in lane.take(10.61)] == [bytes(100)]
    assert lane.due == float("inf")


def test_connections_share_the_queue() -> None:
    """What comes later waits for all that is in front of it, whosever it is."""
    lane = Lane(SLOW, SLOW.rate)
    bulk, urgent = pipe(), pipe()
    lane.put(bulk, bytes(1000), now=0.0)
    lane.put(urgent, bytes(10), now=0.2)
    assert [p for p, _ in lane.take(1.505)] == [bulk]
    assert lane.due == pytest.approx(1.51)
    assert bulk.held == 1000


def test_an_idle_link_saves_nothing_up() -> None:
    lane = Lane(SLOW, SLOW.rate)
    lane.put(pipe(), bytes(100), now=0.0)
    lane.put(pipe(), bytes(100), now=100.0)
    list(lane.take(1.0))
    assert lane.due == pytest.approx(100.6)


def test_without_a_rate_only_the_delay_is_left() -> None:
    lane = Lane(SLOW, float("inf"))
    lane.put(pipe(), bytes(1 << 20), now=1.0)
    assert lane.due == pytest.approx(1.5)


def test_bytes_and_their_end_go_through_a_relay() -> None:
    sent = os.urandom(3 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        echo = threading.Thread(target=echo_all, args=(server,))
        echo.start()
        port = server.getsockname()[1]
        with LINKS["delay"].to(f"tcp:127.0.0.1:{port}") as address:
            begun = time.monotonic()
            with socket.create_connection(("127.0.0.1", int(address[14:]))) as end:
                assert address.startswith("tcp:127.0.0.1:")
                end.settimeout(30)
                end.sendall(sent)
                end.shutdown(socket.SHUT_WR)
                got = read_all(end)
            assert time.monotonic() - begun >= 2 * LINKS["delay"].delay
        echo.join()
    assert got == sent


def echo_all(server: socket.socket) -> None:
    """All of it at once, when it has ended."""
    with server.accept()[0] as sock:
        sock.sendall(read_all(sock))


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
