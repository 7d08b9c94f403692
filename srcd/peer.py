"""The destination, as its return path shows it.

Page requests are answered in C and never come here. The rest are milestones
that the migration waits for, and the peer's reasons when it refuses.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, Refused, StreamError
from common.stream import command, fields, returnpath
from common.stream import constants as c

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.channel import Channel
    from srcd.pump import Pump


# The answers that somebody waits for; a peer may send any others.
MILESTONES: Final = frozenset({c.PING_SETUP, c.PING_LOADED, c.PING_PREPARED})


class Peer:
    """What the destination has said so far.

    `silent` is set when nothing more will be read from it.
    """

    def __init__(self) -> None:
        self.is_dstd = False
        self.silent = trio.Event()
        self._pongs: set[int] = set()
        self._shut = False
        self._reason = ""
        self._asked: set[str] = set()  # blocks whose received bitmap is to come
        self._resumes: bool | None = None  # False: asked to, True: it does
        self._news = trio.Condition()

    def reconnected(self) -> None:
        """A new connection: what it is stays known, what was asked is void."""
        self.silent = trio.Event()
        self._asked = set()
        self._resumes = None

    async def listen(self, pump: Pump) -> None:
        """Read the return path until SHUT 0; Refused if it refuses.

        Nobody waits for an answer that no loop will read: ChannelLost if it is
        stopped before.
        """
        try:
            while not self._shut:
                message = await pump.message()
                if message is None:
                    raise ChannelLost("the channel was shut down", channel="main")
                await self._take(_decode_untrusted(*message), pump)
        finally:
            self.silent.set()

    async def _take(self, message: returnpath.Message, pump: Pump) -> None:
        async with self._news:
            match message:
                case returnpath.Pong(c.PONG_HELLO_ACK):
                    self.is_dstd = True
                case returnpath.Pong(value):
                    self._pongs |= MILESTONES & {value}
                case returnpath.Failure(text):
                    self._reason = text
                case returnpath.Shut(0):
                    self._shut = True
                case returnpath.Shut():
                    raise Refused(self._reason)
                case returnpath.SwitchoverAck():
                    pass
                case returnpath.RecvBitmap(block) if block in self._asked:
                    await pump.owe_missing_untrusted(block)
                    self._asked.remove(block)
                case returnpath.ResumeAck(c.MIGRATION_RESUME_ACK_VALUE) if (
                    self._resumes is not None
                ):
                    self._resumes = True
                case _:
                    raise StreamError("unexpected return path message", got=message)
            self._news.notify_all()

    async def pong(self, value: int) -> None:
        """Wait for the answer to a PING."""
        async with self._news:
            while value not in self._pongs:
                await self._news.wait()

    async def caught_up(self, main: Channel) -> None:
        """Wait until it has taken all that was sent on `main` so far."""
        self._pongs.discard(c.PING_SETUP)
        await main.write(command.encode(command.Ping(c.PING_SETUP)))
        await self.pong(c.PING_SETUP)

    async def tell_migration(self, main: Channel, number: int | None) -> None:
        """Which one this is, so that another's destination takes no page of it."""
        if self.is_dstd and number is not None:
            ping = command.Ping(c.PING_MIGRATION | number)
            await main.write(command.encode(ping))

    async def tell_received(self, main: Channel, blocks: Sequence[str]) -> None:
        """Ask what it has of these blocks; then the rest is what we owe."""
        self._asked = set(blocks)
        questions = [command.encode(command.RecvBitmap(name)) for name in blocks]
        await main.write(b"".join(questions))
        async with self._news:
            while self._asked:
                await self._news.wait()

    async def resume(self, main: Channel) -> None:
        """Say that the handshake is over, and wait until it says so too."""
        self._resumes = False
        await main.write(command.encode(command.Resume()))
        async with self._news:
            while not self._resumes:
                await self._news.wait()

    async def completed(self, main: Channel) -> None:
        """Say that we know that all went well: it need not tell us again."""
        if self.is_dstd:
            with suppress(ChannelLost):
                await main.write(command.encode(command.Ping(c.PING_COMPLETED)))

    async def shut_down(self) -> None:
        """Wait for its last word, that all went well."""
        async with self._news:
            while not self._shut:
                await self._news.wait()


def _decode_untrusted(kind: int, payload: bytes) -> returnpath.Message:
    """The codec reads from the wire's first byte on; the C loop took the head."""
    head = fields.be16(kind) + fields.be16(len(payload))
    return returnpath.read_untrusted(fields.over(head + payload))
