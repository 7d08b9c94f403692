"""What both daemons do around their work: log, control sockets, signals, the end."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import trio

from common import address
from common.errors import MigrationError, cause_of
from common.guest.attached import AttachedGuest
from common.qmp.hmp import HumanMonitor
from common.qmp.server import QmpServer
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from common.config import ServeConfig
    from common.guest.base import Guest
    from common.monitor import Monitor
    from common.qmp.server import Handler


def run(
    program: str, config: ServeConfig, serve: Callable[[ServeConfig], Awaitable[int]]
) -> None:
    """Serve and end the process; an error that an operator can mend is one line."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"{program}: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        sys.exit(trio.run(serve, config))
    except (MigrationError, ExceptionGroup, OSError) as error:
        cause = error if isinstance(error, OSError) else cause_of(error)
        if cause is None:
            raise
        sys.exit(f"{program}: {cause}")


async def serve_monitor(
    config: ServeConfig,
    monitor: Monitor,
    handlers: Mapping[str, Handler],
    nursery: trio.Nursery,
    task_status: trio.TaskStatus[None],
) -> None:
    """Answer on the control sockets until `quit` or a signal."""
    monitor.settings.set_parameters(config.parameters)
    human = HumanMonitor(handlers, cpus=len(monitor.guest.vcpus), check_uri=_check_uri)
    server = QmpServer(
        {**handlers, "human-monitor-command": human.command},
        package=f"postcopyd {version('postcopyd')}",
        group=config.qmp_group,
    )
    human.version = server.version
    monitor.emit = server.event
    monitor.close = server.close
    monitor.take_descriptor = server.take_descriptor
    for path in config.qmp:
        await nursery.start(server.listen, path)
    if isinstance(monitor.guest, AttachedGuest):
        nursery.start_soon(_watch, monitor, monitor.guest)
    nursery.start_soon(_signals, monitor)
    task_status.started()
    await monitor.quitting.wait()
    await server.stop()
    monitor.descriptors.close()


def _check_uri(uri: str) -> None:
    try:
        address.parse(uri)
    except address.AddressError as error:
        raise CommandError(str(error)) from None


@asynccontextmanager
async def responsible_for(guest: Guest, config: ServeConfig) -> AsyncIterator[None]:
    """A guest that we started ends with us, or when we cannot even begin.

    One that attached goes on. A fault of ours ends neither: the guest waits for
    the daemon after us.
    """
    try:
        yield
    except (MigrationError, OSError):
        await _end(guest, config)
        raise
    await _end(guest, config)


async def _end(guest: Guest, config: ServeConfig) -> None:
    if not config.guest.socket:
        await guest.quit()


async def _watch(monitor: Monitor, guest: AttachedGuest) -> None:
    """A guest that is gone cannot be stopped or continued any more."""
    await guest.gone.wait()
    monitor.set_run_state("shutdown")


async def _signals(monitor: Monitor) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as got:
        async for _ in got:
            monitor.shut_down("host-signal")
