"""Automatic recovery at the destination: while it is paused, a source can connect.

A listener lasts, but its name in the file system may be removed, and a daemon
that took up a migration may have found its port in use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, HostError
from common.recovery import Policy

if TYPE_CHECKING:
    from common.channel import Listener
    from common.errors import MigrationError
    from common.settings import Settings

log = logging.getLogger(__name__)

# A name that is removed tells nobody.
LOOK_SECONDS: Final = 1.0


async def notice_loss(listener: Listener, settings: Settings) -> None:
    """Until nobody can connect and that is to be mended: HostError."""
    while True:
        if listener.lost and Policy.of(settings).auto:
            raise HostError(f"nobody can connect to '{listener.address}' any more")
        await trio.sleep(LOOK_SECONDS)


async def open_again(listener: Listener, settings: Settings) -> MigrationError | None:
    """Open a lost listener, if that is wanted; then what is to be said about it."""
    if not (listener.lost and Policy.of(settings).auto):
        return None
    try:
        await listener.reopen()
    except HostError as error:
        return error
    log.warning("listening again at %s", listener.address)
    return ChannelLost("nobody could connect for a while; the listener is open again")
