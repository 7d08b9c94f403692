"""A network between source and destination that breaks when it is told to.

    with Relay() as relay:
        src.migrate(relay.to(dst.listen()))
        relay.links[0].reset()

Each TCP connection to the relay becomes a link: one connection to the
destination, and a thread for each direction. Links are in the order in which
they were made, so of a migration with preempt the first is main.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

AT_ONCE = 64 * 1024
PATIENCE = 30.0


class Link:
    """One connection through the relay.

    `carried` are bytes: from the source, and from the destination.
    """

    def __init__(self, source: socket.socket, destination: socket.socket) -> None:
        self.ends = (source, destination)
        self.carried = [0, 0]
        self._broken = False
        self.threads = [
            threading.Thread(target=self._carry, args=way, daemon=True)
            for way in ((0, source, destination), (1, destination, source))
        ]
        for thread in self.threads:
            thread.start()

    def _carry(self, way: int, giver: socket.socket, taker: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := giver.recv(AT_ONCE):
                self.carried[way] += len(data)
                try:
                    taker.sendall(data)
                except OSError:
                    # Who sends more gets a reset, as from the taker itself;
                    # unless it is to learn nothing of its end.
                    if not self._broken:
                        giver.shutdown(socket.SHUT_RDWR)
        # The end of one direction is the end of that direction alone.
        if not self._broken:
            with contextlib.suppress(OSError):
                taker.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Both ends read the end of the stream; what is on its way is lost."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._join()

    def reset(self) -> None:
        """Both ends get a reset."""
        self._broken = True
        for end in self.ends:
            # Closing is a reset; it comes when no thread is in a call any more.
            linger = struct.pack("ii", 1, 0)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
        self._join()

    def hang_up(self, number: int) -> None:
        """One end reads the end of the stream; the other learns nothing of it."""
        self._broken = True
        with contextlib.suppress(OSError):
            self.ends[number].shutdown(socket.SHUT_RDWR)

    def _join(self) -> None:
        for end in self.ends:
            end.close()
        for thread in self.threads:
            thread.join(PATIENCE)


class Relay:
    """Listens on a port of its own; leaving the context breaks every link."""

    here = "tcp:127.0.0.1:0"
    wrappers: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __init__(self) -> None:
        self.links: list[Link] = []
        self._target = ("", 0)
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes the thread out of accept().
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._server.close()
        for link in self.links:
            link.close()

    def to(self, uri: str) -> str:
        """The address of the relay in front of a `tcp:` address."""
        _, host, port = uri.split(":")
        self._target = (host, int(port))
        return f"tcp:127.0.0.1:{self._server.getsockname()[1]}"

    def wait_links(self, count: int) -> list[Link]:
        """Until so many connections have been made; these."""
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while len(self.links) < count:
                assert self._news.wait(deadline - time.monotonic()), "no connection"
            return self.links[:count]

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._server.accept()
                try:
                    destination = socket.create_connection(self._target)
                except ConnectionRefusedError:
                    source.close()
                    continue
                for end in (source, destination):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._news:
                    self.links.append(Link(source, destination))
                    self._news.notify_all()


class Trap:
    """A destination that takes connections and does nothing for them.

    It says `says` when it has read something, closes them if `hang_up`, and is
    silent then.
    """

    def __init__(self, *, says: bytes = b"", hang_up: bool = False) -> None:
        self._says = says
        self._hang_up = hang_up
        self._taken: list[socket.socket] = []

    @property
    def taken(self) -> int:
        return len(self._taken)

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._server.close()
        for end in self._taken:
            end.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                end, _ = self._server.accept()
                self._taken.append(end)
                end.recv(1)
                end.sendall(self._says)
                if self._hang_up:
                    end.shutdown(socket.SHUT_RDWR)


# Until somebody says that nobody listens there.
REACH = """
import socket
while True:
    try:
        socket.create_connection(("10.99.0.2", 9), timeout=0.1)
    except ConnectionRefusedError:
        break
    except OSError:
        pass
"""


class Cable:
    """Two network namespaces, one for each end, and what connects them.

    Everything can get lost on it silently. `wrappers` start a program at the
    source's and at the destination's end.
    """

    here = "tcp:10.99.0.2:0"
    _ADDRESSES = ("10.99.0.1/24", "10.99.0.2/24")

    def __enter__(self) -> Self:
        self._holders = [_new_namespace() for _ in self._ADDRESSES]
        one, other = (str(holder.pid) for holder in self._holders)
        peer = ("type", "veth", "peer", "name", "cable", "netns", other)
        words = ("ip", "link", "add", "name", "cable", "netns", one, *peer)
        subprocess.run(words, check=True)
        for end, address in enumerate(self._ADDRESSES):
            self._run(end, "ip", "address", "add", address, "dev", "cable")
            self._run(end, "ip", "link", "set", "cable", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            holder.communicate()

    @property
    def wrappers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        one, other = (
            ("nsenter", "--net", "--target", str(holder.pid))
            for holder in self._holders
        )
        return one, other

    def to(self, uri: str) -> str:
        return uri

    def down(self, end: int) -> None:
        """The link of the source's (0) or the destination's (1) end."""
        self._run(end, "ip", "link", "set", "cable", "down")

    def up(self, end: int) -> None:
        """Until packets come through: the kernel takes its time for that."""
        self._run(end, "ip", "link", "set", "cable", "up")
        self._run(0, sys.executable, "-c", REACH)

    def drop(self, *ends: int) -> None:
        """What these ends send vanishes: no end, no reset, no error."""
        chain = "{ type filter hook output priority 0; policy drop; }"
        rules = f"add table inet cable; add chain inet cable out {chain}"
        for end in ends:
            self._run(end, "nft", rules)

    def deliver(self, *ends: int) -> None:
        for end in ends:
            self._run(end, "nft", "delete table inet cable")

    def _run(self, end: int, *words: str) -> None:
        subprocess.run([*self.wrappers[end], *words], check=True)


def _new_namespace() -> subprocess.Popen[bytes]:
    """Of a process that ends when it is told to."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder
