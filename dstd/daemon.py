"""The destination daemon: builds the objects, one nursery, serves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from common import address
from common.guest.obtain import obtain
from common.monitor import Monitor
from common.service import responsible_for, serve_monitor
from dstd.commands import DestinationCommands

if TYPE_CHECKING:
    from common.config import ServeConfig

log = logging.getLogger(__name__)


async def serve(
    config: ServeConfig,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until `quit`, a signal, or a failed migration that ends the process.

    Returns the exit status; `started` when clients and a source can connect.
    """
    async with trio.open_nursery() as nursery:
        guest = await obtain(
            config.guest, nursery, incoming=True, control=config.control
        )
        monitor = Monitor(guest, config.guest.name, "inmigrate")
        async with responsible_for(guest, config, monitor):
            monitor.settings.set_parameters(config.parameters)
            commands = DestinationCommands(monitor, config, nursery)
            if await commands.take_up():
                log.info("see docs/recovery.md")
            elif config.incoming and config.incoming != "defer":
                target = address.parse(config.incoming)
                await commands.listen(target, exit_on_error=True)
            await serve_monitor(
                config, monitor, commands.handlers, nursery, task_status
            )
        nursery.cancel_scope.cancel()
    guest.close()
    if commands.failed:
        log.error("the incoming migration failed: %s", commands.error)
        return 1
    return 0
