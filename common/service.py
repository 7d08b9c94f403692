"""What both daemons do around their work: log, control sockets, signals, the end."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import trio

from common import address
from common.config import ConfigError
from common.errors import MigrationError, Unusable, cause_of
from common.guest.attached import AttachedGuest
from common.guest.stored import StoredGuest
from common.host import journal
from common.host.heartbeat import beat
from common.host.systemd import Notifier, listening_socket, own_descriptors
from common.progress import progress_line
from common.qmp.hmp import HumanMonitor
from common.qmp.server import QmpServer
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from common.config import ConfigFile, ServeConfig
    from common.guest.base import Guest
    from common.monitor import Monitor
    from common.qmp.server import Handler

log = logging.getLogger(__name__)

# Exit statuses; the units start a daemon again after the first of them.
FAILURE: Final = 1
USAGE: Final = 2


def run(
    program: str, config: ServeConfig, serve: Callable[[ServeConfig], Awaitable[int]]
) -> None:
    """Serve and end the process; an error that an operator can mend is one line."""
    journal.set_up(program)
    own_descriptors()
    if config.guest.socket:
        Notifier().status(f"waiting for a guest to attach at {config.guest.socket}")
    try:
        sys.exit(trio.run(serve, config))
    except (MigrationError, ExceptionGroup, OSError) as error:
        cause = cause_of(error) or _refusal(error)
        if cause is None:
            raise
        print(f"{program}: {cause}", file=sys.stderr, flush=True)
        sys.exit(USAGE if isinstance(cause, Unusable) else FAILURE)


def _refusal(error: Exception) -> OSError | None:
    """What the kernel refused, if that is all: it names the file."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        (error,) = error.exceptions
    return error if isinstance(error, OSError) else None


async def serve_monitor(
    config: ServeConfig,
    monitor: Monitor,
    handlers: Mapping[str, Handler],
    nursery: trio.Nursery,
    task_status: trio.TaskStatus[None],
) -> None:
    """Answer on the control sockets until `quit` or a signal."""
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
    for fd in config.sockets:
        await nursery.start(server.serve, listening_socket(fd))
    if isinstance(monitor.guest, AttachedGuest):
        nursery.start_soon(_watch, monitor, monitor.guest)
    notifier = Notifier()
    # Before we are ready: a signal that nobody waits for would kill us.
    await nursery.start(_signals, monitor, config, notifier)
    nursery.start_soon(beat, notifier, _Progress(monitor, handlers).line)
    task_status.started()
    notifier.ready()
    await monitor.quitting.wait()
    notifier.stopping()
    await server.stop()
    monitor.descriptors.close()


def _check_uri(uri: str) -> None:
    try:
        address.parse(uri)
    except address.AddressError as error:
        raise CommandError(str(error)) from None


@asynccontextmanager
async def responsible_for(
    guest: Guest, config: ServeConfig, monitor: Monitor
) -> AsyncIterator[None]:
    """A guest that we started ends with us, or when we cannot even begin.

    One that attached goes on. A fault of ours ends neither: the guest waits for
    the daemon after us.
    """
    try:
        yield
    except (MigrationError, OSError):
        lasts = isinstance(guest, AttachedGuest | StoredGuest) and guest.has_outlived
        if not lasts:
            await _end(guest, config)
        raise
    if monitor.guest_stays:
        log.warning("ended in the middle of postcopy: %s", monitor.way_on())
    else:
        await _end(guest, config)


async def _end(guest: Guest, config: ServeConfig) -> None:
    if not config.guest.socket:
        await guest.quit()


async def _watch(monitor: Monitor, guest: AttachedGuest) -> None:
    """A guest that is gone cannot be stopped or continued any more."""
    await guest.gone.wait()
    monitor.set_run_state("shutdown")


class _Progress:
    """The status line of the service, from what clients are told."""

    def __init__(self, monitor: Monitor, handlers: Mapping[str, Handler]) -> None:
        self._monitor = monitor
        self._query = handlers["query-migrate"]
        self._complained = False

    async def line(self) -> str:
        try:
            return progress_line(await self._query({}), self._monitor.run_state)
        except Exception:
            # As in QmpServer.execute: no guest is lost because a query was wrong.
            if not self._complained:
                log.exception("query-migrate failed")
            self._complained = True
            return "query-migrate failed; the log says why"


async def _signals(
    monitor: Monitor,
    config: ServeConfig,
    notifier: Notifier,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """SIGHUP reads the configuration file again; without one it ends us, too."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as got:
        task_status.started()
        async for number in got:
            if number == signal.SIGHUP and config.file:
                notifier.reloading()
                _reload(monitor, config.file)
                notifier.ready()
            else:
                monitor.shut_down("host-signal")


def _reload(monitor: Monitor, file: ConfigFile) -> None:
    """Take the migration parameters of the file; a bad file changes nothing."""
    try:
        now = file.again()
        monitor.settings.set_parameters(now.parameters)
    except (ConfigError, CommandError) as error:
        log.error("the configuration stays as it was: %s", error)
        return
    log.info("%s: took the migration parameters", file.path)
    if now.options != file.options:
        log.warning("%s: what else has changed takes a restart", file.path)
