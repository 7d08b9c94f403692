"""The source: what it is, what it has promised, and how it is spoken to."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, HostError, MigrationError, StreamError
from common.stream import command, fields, returnpath
from common.stream import constants as c

if TYPE_CHECKING:
    from common.channel import Channel
    from dstd.fault import Memory

log = logging.getLogger(__name__)

# How long telling the source why may take.
LAST_WORDS_SECONDS: Final = 10.0


class Peer:
    """The source at the other end of `main`.

    `committed` is set when srcd has given its guest up for good.
    """

    def __init__(self, main: Channel) -> None:
        self._main = main
        self.return_path = False
        self.is_srcd = False
        self.preempts = False  # srcd only: it will open a preempt channel
        self.migration: int | None = None  # srcd only: the number it has told
        self.committed = trio.Event()
        self._let_go = False

    def comes_back(self, *, is_srcd: bool, migration: int | None) -> None:
        """A source that resumes says nothing of itself again but its number."""
        self.return_path = True
        self.is_srcd = is_srcd
        self.migration = migration

    async def command(self) -> command.Command:
        """The command behind the type byte that was read last."""
        return await self._main.decode(command.read_untrusted)

    async def next_kind(self) -> int:
        """The next type byte."""
        return await self._main.decode(fields.u8_untrusted)

    async def ping(self, value: int) -> None:
        """Answer a PING, and note what ours mean."""
        if not self.return_path:
            raise StreamError("PING without a return path", got=value)
        if value == c.PING_COMMIT:
            # From here on the guest is ours alone, whether the answer arrives
            # or not.
            self.committed.set()
            with suppress(ChannelLost):
                await self.say(returnpath.Pong(value))
            return
        await self.say(returnpath.Pong(value))
        if value == c.PING_HELLO:
            self.is_srcd = True
            await self.say(returnpath.Pong(c.PONG_HELLO_ACK))
        elif value == c.PING_PREEMPT:
            self.preempts = True
        elif self.is_srcd and self.migration is None:
            self.migration = _migration(value)

    async def say(self, message: returnpath.Message) -> None:
        await self._main.write(returnpath.encode(message))

    async def wait_for_resume(self, memory: Memory) -> None:
        """Answer what the source asks before it resumes a paused postcopy."""
        while True:
            if (kind := await self.next_kind()) != c.QEMU_VM_COMMAND:
                raise StreamError("unexpected in a recovery", got=kind)
            match await self.command():
                case command.RecvBitmap(block):
                    message = returnpath.encode(returnpath.RecvBitmap(block))
                    await self._main.write(message + memory.received_untrusted(block))
                case command.Ping(value):
                    await self._check_migration(value)
                    await self.ping(value)
                case command.Resume():
                    # A source resumes only what it has given up for good.
                    self.committed.set()
                    return
                case found:
                    raise StreamError("command that does not belong here", got=found)

    async def _check_migration(self, ping: int) -> None:
        """HostError, which the source is told: it resumes another migration."""
        number = _migration(ping)
        # None in the record: an older daemon began it.
        theirs = self.is_srcd and self.migration in (None, number)
        if number is None or theirs:
            return
        self.is_srcd = True  # no other source tells a number
        error = HostError(
            "the source belongs to another migration than this destination; nothing"
            " has been changed: resume it at the destination that has its guest"
        )
        await self.tell(error)
        raise error

    async def wait_for_commit(self) -> None:
        """At the end of precopy: srcd's word that it never runs the guest again."""
        while not self.committed.is_set():
            kind = await self.next_kind()
            found = await self.command() if kind == c.QEMU_VM_COMMAND else None
            if not isinstance(found, command.Ping):
                raise StreamError("expected the source's COMMIT", got=kind)
            await self.ping(found.value)

    async def let_go(self) -> None:
        """Say SHUT 0: all went well. QEMU goes on with its guest without it."""
        if self.return_path and not self._let_go:
            self._let_go = True
            await self.say(returnpath.Shut(0))

    async def done(self) -> bool:
        """The guest runs here. What is said last must not be lost, but if the
        connection is, that changes nothing any more. False: perhaps it was.
        """
        try:
            await self.let_go()
        except ChannelLost as error:
            log.warning("the source may not know that all has arrived: %s", error)
            return False
        return await (self._completed() if self.is_srcd else self._main.drain())

    async def _completed(self) -> bool:
        """Whether srcd says that it has noted it. Its channel's end is no answer:
        that is also what comes when it dies.
        """
        with trio.move_on_after(LAST_WORDS_SECONDS), suppress(MigrationError):
            while await self.next_kind() == c.QEMU_VM_COMMAND:
                if await self.command() == command.Ping(c.PING_COMPLETED):
                    return True
        return False

    async def tell(self, error: MigrationError) -> None:
        """Say why and that it is over; the source goes on with its guest."""
        if not self.return_path or self._let_go or isinstance(error, ChannelLost):
            return
        self._main.stop.clear()
        with suppress(MigrationError), trio.move_on_after(LAST_WORDS_SECONDS):
            if self.is_srcd:
                await self.say(returnpath.Failure(str(error)))
            await self.say(returnpath.Shut(1))
            await self._main.drain()


def _migration(ping: int) -> int | None:
    """The number of a migration that this PING tells, if it does."""
    number = ping - c.PING_MIGRATION
    return number if 0 <= number < c.MIGRATIONS else None
