"""The source daemon: builds the objects, one nursery, serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from common.guest.obtain import obtain
from common.guest.stored import StoredGuest
from common.monitor import Monitor, guest_runs
from common.service import responsible_for, serve_monitor
from srcd.commands import SourceCommands

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.config import ServeConfig
    from common.qmp.message import Json

POSTCOPY: Final[Mapping[str, Json]] = {"capability": "postcopy-ram", "state": True}
EVENTS: Final[Mapping[str, Json]] = {"capability": "events", "state": True}


async def serve(
    config: ServeConfig,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until `quit` or a signal; `started` when clients can connect."""
    async with trio.open_nursery() as nursery:
        guest = await obtain(
            config.guest, nursery, incoming=False, control=config.control
        )
        monitor = Monitor(guest, config.guest.name, guest_runs(guest))
        async with responsible_for(guest, config, monitor):
            monitor.settings.set_parameters(config.parameters)
            if isinstance(guest, StoredGuest):
                monitor.settings.set_capabilities(_capabilities(guest))
            commands = SourceCommands(
                monitor,
                nursery,
                track=config.track,
                preempt_early=config.preempt_early,
                tuning=config.tuning,
                stored=config.stored,
            )
            await commands.take_up()
            await serve_monitor(
                config, monitor, commands.handlers, nursery, task_status
            )
            await commands.give_up()
        nursery.cancel_scope.cancel()
    guest.close()
    return 0


def _capabilities(guest: StoredGuest) -> list[Mapping[str, Json]]:
    """What a parked VM needs that is not switched on by anybody.

    A VM that runs before its RAM is there is in postcopy from the first page on;
    and in the middle of one a client cannot switch anything on.
    """
    if guest.mark:
        return [POSTCOPY, EVENTS]
    return [POSTCOPY] if guest.lazy else []
