"""The source daemon: builds the objects, opens the sockets, one nursery."""

from __future__ import annotations

import signal
from importlib.metadata import version
from typing import TYPE_CHECKING

import trio

from common.guest.attached import AttachedGuest
from common.guest.obtain import obtain
from common.monitor import Monitor, guest_runs
from common.qmp.server import QmpServer
from srcd.commands import SourceCommands

if TYPE_CHECKING:
    from common.config import ServeConfig


async def serve(
    config: ServeConfig,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve until `quit` or a signal; `started` when clients can connect."""
    async with trio.open_nursery() as nursery:
        guest = await obtain(
            config.guest, nursery, incoming=False, control=config.qmp[0]
        )
        monitor = Monitor(guest, config.guest.name, guest_runs(guest))
        commands = SourceCommands(
            monitor, nursery, track=config.track, preempt_early=config.preempt_early
        )
        server = QmpServer(
            commands.handlers, package=f"postcopyd {version('postcopyd')}"
        )
        monitor.emit = server.event
        monitor.close = server.close
        for path in config.qmp:
            await nursery.start(server.listen, path)
        if isinstance(guest, AttachedGuest):
            nursery.start_soon(_watch, monitor, guest)
        nursery.start_soon(_signals, monitor)
        task_status.started()
        await monitor.quitting.wait()
        await server.stop()
        if not config.guest.socket:
            await guest.quit()
        nursery.cancel_scope.cancel()
    guest.close()
    return 0


async def _watch(monitor: Monitor, guest: AttachedGuest) -> None:
    """A guest that is gone cannot be stopped or continued any more."""
    await guest.gone.wait()
    monitor.set_run_state("shutdown")


async def _signals(monitor: Monitor) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as got:
        async for _ in got:
            monitor.shut_down("host-signal")
