"""Bad clients of a control socket, all at once; run as a program of its own.

    python qmp_load.py SOCKET CLIENTS INPUTS

Says `loaded` when all clients are connected, and at the end how many malformed
inputs were answered. Clients take turns in being of these kinds: one that never
reads what it asks for, one that sends nonsense and reads, one that stops in the
middle of a request, one that comes and goes.
"""

from __future__ import annotations

import random
import sys
from contextlib import suppress

import trio

NEGOTIATE = b'{"execute":"qmp_capabilities"}\n'
GOOD = b'{"execute":"query-commands","id":"good"}\n'
# Ends whatever was begun, at the price of one error.
RESYNC = b"\xff\n"
PIECES = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"%", b"\x00", b"\xff"),
    *(b"nul", b"tru", b"-", b"01", b"1e", b"\xc0\x80", b"\xed\xa0\x80", b"\\ud800"),
    *(b'{"execute":', b'"quit'),
    *(b'{"execute":1}', b'{"id":1}', b'{"execute":"no","x":1}', b"\n", b"\xef\xbb\xbf"),
)


LARGE = (b"{" * 1100, b"x" * 2000, b"[1," * 200, b"%{" * 500, b'"' + b"x" * 9000)


def nonsense(dice: random.Random) -> bytes:
    if dice.random() < 0.02:
        return dice.choice(LARGE)
    return b"".join(dice.choices(PIECES, k=dice.randint(1, 8)))


class Load:
    def __init__(self, path: str, clients: int, inputs: int) -> None:
        self.path = path
        self.clients = clients
        self.inputs = inputs
        self.answered = 0
        self.connected = 0
        self.done = trio.Event()

    async def run(self) -> None:
        kinds = (self.deaf, self.wild, self.slow, self.fickle)
        async with trio.open_nursery() as nursery:
            for number in range(self.clients):
                kind = kinds[number % len(kinds)]
                nursery.start_soon(kind, random.Random(number))
            await self.done.wait()
            nursery.cancel_scope.cancel()
        print(f"answered {self.answered}", flush=True)

    async def _open(self) -> trio.SocketStream:
        stream = await trio.open_unix_socket(self.path)
        self.connected += 1
        if self.connected == self.clients:
            print("loaded", flush=True)
        return stream

    async def deaf(self, _: random.Random) -> None:
        stream = await self._open()
        with suppress(trio.BrokenResourceError):
            await stream.send_all(NEGOTIATE)
            while True:
                await stream.send_all(GOOD * 100)

    async def wild(self, dice: random.Random) -> None:
        stream = await self._open()
        await stream.send_all(NEGOTIATE)
        while True:
            inputs = [nonsense(dice) for _ in range(20)]
            await self._until_answered(stream, b"\xff".join(inputs))
            self.answered += len(inputs)
            if self.answered >= self.inputs:
                self.done.set()

    async def _until_answered(self, stream: trio.SocketStream, data: bytes) -> None:
        """Send it, and read until the server understands us again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data + RESYNC + GOOD)
            seen = b""
            while b'"id": "good"' not in seen:
                more = await stream.receive_some()
                assert more, "the server has closed the connection"
                seen = seen[-100:] + more

    async def slow(self, dice: random.Random) -> None:
        stream = await self._open()
        await stream.send_all(NEGOTIATE + b'{"execute":"query-')
        while True:
            await trio.sleep(dice.random())
            await stream.send_all(b"x")

    async def fickle(self, dice: random.Random) -> None:
        stream = await self._open()
        while True:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(NEGOTIATE + GOOD + nonsense(dice))
            await stream.aclose()
            await trio.sleep(dice.random())
            stream = await trio.open_unix_socket(self.path)


if __name__ == "__main__":
    trio.run(Load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).run)
