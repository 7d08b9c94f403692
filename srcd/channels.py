"""The source's channels: main, perhaps preempt, one pair for each attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.channel import Channel, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.address import Address
    from common.errors import ChannelLost
    from common.native.loop import Stop
    from common.tuning import Tuning


class Channels:
    """Those of one migration, from attempt to attempt.

    `answers`: whether there is a return path.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.answers = False
        self.preempt: Channel | None = None
        self._tuning = tuning
        self._main: Channel | None = None
        self._sent_before = 0  # on channels that are closed
        self._why_broken: ChannelLost | None = None

    @property
    def main(self) -> Channel:
        assert self._main is not None
        return self._main

    @property
    def sent(self) -> int:
        """Bytes on all channels; stays known when they are closed."""
        return self._sent_before + sum(channel.sent for channel in self._open())

    async def open_main(self, address: Address) -> None:
        """ChannelLost or HostError if nobody is there."""
        self._main = await self._connect(address, "main")

    async def open_preempt(self, address: Address) -> None:
        """Besides main, and stopped with it."""
        self.preempt = await self._connect(address, "preempt", self.main.stop)

    async def _connect(
        self, address: Address, name: str, stop: Stop | None = None
    ) -> Channel:
        return await connect(
            address,
            name,
            stop,
            congestion=self._tuning.congestion,
            peer_timeout=self._tuning.peer_timeout,
        )

    def _open(self) -> Iterator[Channel]:
        for channel in (self._main, self.preempt):
            if channel:
                yield channel

    def shutdown(self) -> None:
        """The loops on them end, and nothing more is sent."""
        for channel in self._open():
            channel.shutdown()

    def break_connection(self, why: ChannelLost) -> None:
        """The loops on them see their end; what is told is `why`."""
        self._why_broken = why
        for channel in self._open():
            channel.break_connection()

    def why_broken(self) -> ChannelLost | None:
        """What is to be told of it, once; None: it was not our doing."""
        why, self._why_broken = self._why_broken, None
        return why

    def close(self) -> None:
        """All loops on them have ended."""
        for channel in (self.preempt, self._main):
            if channel:
                self._sent_before += channel.sent
                channel.close()
        self.preempt = self._main = None

    def close_preempt(self) -> None:
        """The destination has no use for it, and nothing was sent."""
        if self.preempt:
            self.preempt.close()
        self.preempt = None
