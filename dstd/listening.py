"""Where the source can connect: the first time, and when it comes back.

While postcopy is paused the operator may say another place, so there is one
listener after the other.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from common import address
from common.channel import Listener
from common.errors import HostError
from dstd.recovery import notice_loss, open_again

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.address import Address
    from common.channel import Channel
    from common.errors import MigrationError
    from common.qmp.message import Json
    from common.settings import Settings

log = logging.getLogger(__name__)


class Listening:
    """The listener of one migration; `begin` or `begin_again` comes first.

    `peer_timeout` is in seconds, for the channels that come in.
    """

    def __init__(self, settings: Settings, *, peer_timeout: int) -> None:
        self._settings = settings
        self._peer_timeout = peer_timeout
        self._listener: Listener | None = None
        self._waiting = trio.CancelScope()  # for a source that resumes

    @property
    def listener(self) -> Listener:
        """The one that is used now."""
        assert self._listener is not None
        return self._listener

    def addresses(self) -> list[dict[str, Json]]:
        """As `query-migrate` shows them."""
        return self._listener.describe() if self._listener else []

    @property
    def lasting(self) -> Mapping[str, Json] | None:
        """Where a daemon after us can listen in our place, for its record."""
        return address.to_json(self._listener.lasting) if self._listener else None

    async def open(self, target: Address) -> Listener:
        """A listener there, besides the one that is used; HostError."""
        listener = Listener(target, peer_timeout=self._peer_timeout)
        await listener.open()
        return listener

    async def begin(self, target: Address) -> None:
        """Listen there; HostError."""
        self._listener = await self.open(target)

    async def begin_again(self, kept: Mapping[str, Json] | None) -> HostError | None:
        """Where a daemon before us listened, if that is possible.

        Else the operator says where; the error is why.
        """
        target = address.of_json_untrusted(dict(kept or {}))
        self._listener = Listener(target or address.Tcp("", "0"))
        if target is None:
            return None
        try:
            await self.begin(target)
        except HostError as error:
            log.warning("order migrate-recover with another address: %s", error)
            return error
        return None

    def is_at(self, target: Address) -> bool:
        """Whether whoever connects there comes here."""
        return self.listener.is_at(target) and not self.listener.lost

    def move_to(self, listener: Listener) -> None:
        """Use this one from now on, and close the one before."""
        # First: who waits on a listener that is closed gets an error.
        self._waiting.cancel()
        self.listener.close()
        self._listener = listener

    async def next_source(
        self, wait_gone: Callable[[], Awaitable[object]]
    ) -> Channel | None:
        """The next connection; None: we listen somewhere else now.

        HostError if nobody can connect any more. `wait_gone` raises when there
        is no guest to come back to.
        """
        main = None
        with trio.CancelScope() as self._waiting:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_gone)
                nursery.start_soon(notice_loss, self.listener, self._settings)
                main = await self.listener.accept("main")
                nursery.cancel_scope.cancel()
        return main

    async def mend(self) -> MigrationError | None:
        """Open a lost listener, if that is wanted; then what is to be said of it."""
        return await open_again(self.listener, self._settings)

    def close(self) -> None:
        self.listener.close()
