"""The task that keeps the service manager informed: alive, and doing what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from common.host.systemd import watchdog_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.host.systemd import Notifier

# How old the status line may be; also the beat without a watchdog.
STATUS_SECONDS: Final = 1.0
# sd_watchdog_enabled(3) recommends half; a third survives one that comes late.
BEATS: Final = 3


async def beat(
    notifier: Notifier,
    line: Callable[[], Awaitable[str]],
    *,
    watchdog: float | None = None,
) -> None:
    """Send WATCHDOG=1 and, if it has changed, the status `line`, for ever.

    It runs as a task among the daemon's others and asks the migration for its
    state: when their loop or that answer hangs, the beat stops and the manager
    restarts the daemon. `watchdog` in seconds, the environment's if None.
    """
    if not notifier.heard:
        return
    watchdog = watchdog or watchdog_seconds()
    period = min(STATUS_SECONDS, watchdog / BEATS) if watchdog else STATUS_SECONDS
    while True:
        notifier.status(await line())
        if watchdog:
            notifier.alive()
        await trio.sleep(period)
