"""A link between source and destination: delay, rate, buffers that say nothing.

A relay is a process of its own that takes TCP connections and makes one to the
destination for each. All of them share the link, so what one has put into it
is in front of what another puts into it later:

    source -> [ FIFO: leaves at the rate, arrives after the delay ] -> destination
           <- [ arrives after the delay                           ] <-

It reads eagerly, as a network with deep buffers does: the source's TCP sees
room where there is only a long queue.

    python bench/relay.py slow 127.0.0.1 4444     prints the port it listens on
"""

from __future__ import annotations

import ctypes
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PR_SET_TIMERSLACK: Final = 29
ECHOES: Final = 100
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What lies between the two sides; delays in seconds, one way."""

    name: str
    delay: float
    rate: float = float("inf")
    """Bytes per second from the source to the destination, all connections."""
    chunk: int
    """Bytes that are taken from a connection before the next has its turn."""
    buffer: int
    """Bytes of each connection that the link holds."""

    @contextmanager
    def to(self, address: str) -> Iterator[str]:
        """A relay to a `tcp:` address; gives the address in front of it."""
        _, host, port = address.split(":")
        words = [sys.executable, __file__, self.name, host, port]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                yield f"tcp:127.0.0.1:{int(process.stdout.readline())}"
            finally:
                process.terminate()

    def round_trip(self) -> float:
        """Seconds that a small message takes there and back, link idle; measured."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=_echo, args=(server,), daemon=True).start()
            with (
                self.to(f"tcp:127.0.0.1:{server.getsockname()[1]}") as address,
                _connect("127.0.0.1", int(address.split(":")[2])) as end,
            ):
                return statistics.median(_echo_time(end) for _ in range(ECHOES))


LINKS: Final = {
    link.name: link
    for link in (
        Link(name="delay", delay=0.0005, chunk=256 << 10, buffer=4 * MIB),
        Link(name="slow", delay=0.001, rate=12.5e6, chunk=16 << 10, buffer=64 * MIB),
        Link(name="wide", delay=0, rate=50e6, chunk=16 << 10, buffer=64 * MIB),
        Link(name="deep", delay=0, rate=12.5e6, chunk=16 << 10, buffer=64 * MIB),
    )
}


# -- one direction of the link


@dataclass(slots=True, eq=False)
class Pipe:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    arrived: deque[memoryview] = field(default_factory=deque)
    """Through the link, and waiting for room at the receiver."""
    held: int = 0
    """Bytes in the link and in `arrived`."""
    reading: bool = True
    ended: bool = False
    """The end of the stream has come through the link."""

    def flush(self) -> None:
        """Write what the receiver takes."""
        with suppress(BlockingIOError):
            while self.arrived:
                sent = self.sink.send(self.arrived[0])
                self.held -= sent
                rest = self.arrived[0][sent:]
                if rest:
                    self.arrived[0] = rest
                else:
                    self.arrived.popleft()
        if self.ended and not self.arrived:
            self.sink.shutdown(socket.SHUT_WR)
            self.ended = False


class Lane:
    """One direction of the link, for all connections: a queue in order of time."""

    def __init__(self, link: Link, rate: float) -> None:
        self._delay = link.delay
        self._rate = rate
        self._free = 0.0  # when the last byte of the queue will have left
        self._queue: deque[tuple[float, Pipe, bytes]] = deque()

    def put(self, pipe: Pipe, data: bytes, now: float) -> None:
        """Empty data are the end of the pipe's stream."""
        self._free = max(self._free, now) + len(data) / self._rate
        self._queue.append((self._free + self._delay, pipe, data))
        pipe.held += len(data)

    @property
    def due(self) -> float:
        """When the next arrives; infinite if nothing is on its way."""
        return self._queue[0][0] if self._queue else float("inf")

    def take(self, now: float) -> Iterator[tuple[Pipe, bytes]]:
        """What has arrived by now."""
        while self.due <= now:
            _, pipe, data = self._queue.popleft()
            yield pipe, data


# -- the process


class Relay:
    """Connections from one listener to one address, over one link."""

    def __init__(self, link: Link, host: str, port: int) -> None:
        self._link = link
        self._there = (host, port)
        self._lanes = (Lane(link, link.rate), Lane(link, float("inf")))
        self._pipes: dict[Pipe, Lane] = {}
        self.listener = socket.create_server(("127.0.0.1", 0))

    def serve(self) -> None:
        """Until the process is ended."""
        while True:
            self._wait_and_read()
            self._deliver()

    def _wait_and_read(self) -> None:
        room = self._link.buffer
        readers = {p.source: p for p in self._pipes if p.reading and p.held < room}
        writers = {p.sink: p for p in self._pipes if p.arrived}
        due = min(lane.due for lane in self._lanes)
        left = None if due == float("inf") else max(due - time.monotonic(), 0)
        readable, writable, _ = select.select(
            [self.listener, *readers], list(writers), [], left
        )
        for sock in readable:
            if sock is self.listener:
                self._accept()
            else:
                self._read(readers[sock])
        for sock in writable:
            self._guarded(writers[sock])

    def _accept(self) -> None:
        near, _ = self.listener.accept()
        far = _connect(*self._there)
        for lane, source, sink in zip(
            self._lanes, (near, far), (far, near), strict=True
        ):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source.setblocking(False)
            self._pipes[Pipe(source, sink)] = lane

    def _read(self, pipe: Pipe) -> None:
        try:
            data = pipe.source.recv(self._link.chunk)
            # The ends of a connection acknowledge at once, see srcd's return path.
            pipe.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except ConnectionError:
            data = b""
        pipe.reading = bool(data)
        self._pipes[pipe].put(pipe, data, time.monotonic())

    def _deliver(self) -> None:
        for lane in self._lanes:
            for pipe, data in lane.take(time.monotonic()):
                if data:
                    pipe.arrived.append(memoryview(data))
                else:
                    pipe.ended = True
                self._guarded(pipe)

    def _guarded(self, pipe: Pipe) -> None:
        """A receiver that has gone is told to its sender by the end of reading."""
        try:
            pipe.flush()
        except OSError:
            pipe.arrived.clear()
            pipe.held = 0
            pipe.reading = pipe.ended = False
            with suppress(OSError):
                pipe.source.shutdown(socket.SHUT_RD)


def _connect(host: str, port: int) -> socket.socket:
    sock = socket.create_connection((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _echo(server: socket.socket) -> None:
    with server.accept()[0] as sock:
        while data := sock.recv(64):
            sock.sendall(data)


def _echo_time(sock: socket.socket) -> float:
    begun = time.perf_counter()
    sock.sendall(b"?")
    sock.recv(1)
    return time.perf_counter() - begun


def main() -> None:
    name, host, port = sys.argv[1:]
    relay = Relay(LINKS[name], host, int(port))
    # The kernel may be late by 50 us without this, which is a tenth of a delay.
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    print(relay.listener.getsockname()[1], flush=True)
    relay.serve()


if __name__ == "__main__":
    main()
