"""The preempt channel of one migration: whether there is one, and since when.

A guest's operator says so. A parked VM goes to a QEMU that somebody else has
started, so it is found out (preempt.py).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from common.address import takes_many
from common.errors import ChannelLost
from srcd import preempt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.address import Address
    from common.channel import Channel
    from srcd.departure import Departure

log = logging.getLogger(__name__)


class Urgent:
    """Makes the channel when the destination is ready for it.

    `early`: the destination is QEMU 7. It reads nothing from main before it has
    both, and tells them apart by their order.
    """

    def __init__(self, departure: Departure, *, early: bool) -> None:
        self.early = early
        self._departure = departure
        self._channels = departure.channels
        self._undecided: float | None = None
        """Until when the end of a channel that is tried may be on its way."""

    @property
    def _is_on(self) -> bool:
        return self._departure.settings.on("postcopy-preempt")

    @property
    def channel(self) -> Channel | None:
        """What urgent pages go on for certain; else they go on main."""
        return self._channels.preempt if self._undecided is None else None

    @property
    def known(self) -> bool | None:
        """Whether there is one; None: that is to be found out."""
        parked = self._departure.parked
        return parked.preempt if parked else self.channel is not None

    async def connect(self, address: Address) -> None:
        """Make it, if there is to be one."""
        parked = self._departure.parked
        if parked.preempt if parked else self._is_on:
            await self._channels.open_preempt(address)

    # -- found out

    def is_unknown(self, address: Address) -> bool:
        """Whether it is to be found out, at a destination there."""
        parked = self._departure.parked
        unknown = parked is not None and parked.preempt is None
        return unknown and self._departure.advises and takes_many(address)

    async def while_answering(
        self, address: Address, answer: Callable[[], Awaitable[None]]
    ) -> None:
        """The first `answer` on main; QEMU 7 gives none before there are both."""
        await preempt.answered_or(partial(self._try_early, address), answer)

    async def _try_early(self, address: Address) -> None:
        await self._channels.open_preempt(address)
        self.early = True

    async def find(self, address: Address) -> None:
        """Find it out; of a QEMU that answers early, it may take until `decide`."""
        parked, peer = self._departure.parked, self._departure.peer
        assert parked is not None
        if peer.is_dstd:
            parked.preempt = self._is_on
            await self.connect(address)
            return
        if self._channels.preempt is None:
            await self._channels.open_preempt(address)
        assert self._channels.preempt
        self._undecided = await preempt.looked_at(
            partial(peer.caught_up, self._channels.main)
        )
        if self.early:  # it makes a difference from the package on
            await self.decide()

    async def decide(self) -> None:
        """What is tried is wanted, or it is closed: `channel` tells from now on.

        That it was closed is not remembered: perhaps only the connection was lost,
        and a recovery with one channel too few would wait for ever.
        """
        if self._undecided is None:
            return
        parked, channel = self._departure.parked, self._channels.preempt
        assert parked
        assert channel
        if stays := await preempt.stays_open(channel, self._undecided):
            parked.preempt = True
            self._departure.journal.write(preempt=True)
        else:
            self._channels.close_preempt()
            self.early = False
        self._undecided = None
        log.info("preempt channel: %s", "yes" if stays else "no")

    # -- used

    def check(self) -> None:
        """A destination that has the capability off has closed it by now."""
        if self.channel and self.channel.hung_up():
            raise ChannelLost(
                "the destination has closed the preempt channel; switch"
                " postcopy-preempt on on both sides or on neither",
                channel="preempt",
            )
