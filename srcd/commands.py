"""The source's QMP commands: checked arguments in, one call, reply out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from common import address, status
from common.errors import MigrationError
from common.qmp.session import CommandError
from common.status import MigrationStatus as M
from srcd.outgoing import OutgoingMigration
from srcd.report import migration_info

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.monitor import Monitor
    from common.qmp.message import Json
    from common.qmp.server import Handler

# How long taking the guest back may take when the daemon ends.
GIVE_UP_SECONDS: Final = 10.0
IN_PROGRESS: Final = frozenset(M) - {M.NONE, M.COMPLETED, M.FAILED, M.CANCELLED}
POSTCOPY: Final = frozenset(
    {
        M.POSTCOPY_ACTIVE,
        M.POSTCOPY_PAUSED,
        M.POSTCOPY_RECOVER_SETUP,
        M.POSTCOPY_RECOVER,
    }
)


class SourceCommands:
    """Migrates the monitor's guest away, one migration at a time."""

    def __init__(
        self,
        monitor: Monitor,
        nursery: trio.Nursery,
        *,
        track: bool = True,
        preempt_early: bool = False,
    ) -> None:
        self._monitor = monitor
        self._nursery = nursery
        self._preempt_early = preempt_early
        self._track = track
        self._status = status.outgoing()
        self._status.listeners.append(monitor.announce)
        self._migration: OutgoingMigration | None = None
        monitor.settings.changed = self._apply_limits

    @property
    def handlers(self) -> dict[str, Handler]:
        return {
            **self._monitor.handlers,
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "migrate-incoming": self._migrate_incoming,
            "migrate-set-capabilities": self._set_capabilities,
            "migrate-start-postcopy": self._start_postcopy,
            "migrate_cancel": self._cancel,
            "query-migrate": self._query_migrate,
        }

    def _emit(self, name: str, data: Mapping[str, Json] | None) -> None:
        if name != "MIGRATION_PASS" or self._monitor.settings.on("events"):
            self._monitor.emit(name, data)

    def _apply_limits(self) -> None:
        if self._migration:
            self._migration.apply_limits()

    # -- run state

    async def _stop(self, _: Mapping[str, Json]) -> Json:
        if self._monitor.run_state == "running":
            await self._checked(self._monitor.stop_guest)
        return None

    async def _cont(self, _: Mapping[str, Json]) -> Json:
        if self._monitor.run_state in ("finish-migrate", "postmigrate"):
            raise CommandError("Migration is not finalized yet")
        if self._monitor.run_state != "running":
            await self._checked(self._monitor.continue_guest)
        return None

    async def _checked(self, change: Callable[[], Awaitable[None]]) -> None:
        try:
            await change()
        except MigrationError as error:
            raise CommandError(str(error)) from None

    # -- migration

    async def _migrate(self, arguments: Mapping[str, Json]) -> Json:
        target = _address(arguments)
        many = isinstance(target, address.Tcp | address.Unix)
        if self._monitor.settings.on("postcopy-preempt") and not many:
            raise CommandError("Migration requires multi-channel URIs (e.g. tcp)")
        if arguments.get("resume"):
            raise CommandError("Cannot resume if there is no paused migration")
        if self._status.now in IN_PROGRESS:
            raise CommandError("There's a migration process in progress")
        if self._monitor.run_state == "postmigrate":
            raise CommandError(
                "Can't migrate the vm that was paused due to previous migration"
            )
        try:
            self._migration = OutgoingMigration(
                self._monitor.guest,
                self._monitor.settings,
                self._status,
                self._emit,
                self._monitor.set_run_state,
                track=self._track,
                preempt_early=self._preempt_early,
            )
        except MigrationError as error:
            raise CommandError(str(error)) from None
        self._status.set(M.SETUP)
        self._nursery.start_soon(self._migration.run, target)
        return None

    async def _migrate_incoming(self, _: Mapping[str, Json]) -> Json:
        raise CommandError("'-incoming' was not specified on the command line")

    async def _set_capabilities(self, arguments: Mapping[str, Json]) -> Json:
        if self._status.now in IN_PROGRESS:
            raise CommandError("There's a migration process in progress")
        return await self._monitor.handlers["migrate-set-capabilities"](dict(arguments))

    async def _start_postcopy(self, _: Mapping[str, Json]) -> Json:
        if not self._monitor.settings.on("postcopy-ram"):
            raise CommandError(
                "Enable postcopy with migrate_set_capability before the start of"
                " migration"
            )
        if self._migration is None:
            raise CommandError(
                "Postcopy must be started after migration has been started"
            )
        self._migration.start_postcopy()
        return None

    async def _cancel(self, _: Mapping[str, Json]) -> Json:
        if self._status.now in POSTCOPY:
            raise CommandError("Postcopy migration in progress, cannot cancel.")
        if self._migration and self._status.may(M.CANCELLING):
            if not self._migration.cancellable:
                raise CommandError(
                    "The guest is being handed over, cannot cancel any more"
                )
            self._status.set(M.CANCELLING)
            self._migration.cancel()
        return None

    async def give_up(self) -> None:
        """The daemon ends: a guest that is still ours goes on where it is."""
        if not self._migration or not self._status.may(M.CANCELLING):
            return
        if self._migration.cancellable:
            self._status.set(M.CANCELLING)
            self._migration.cancel()
            with trio.move_on_after(GIVE_UP_SECONDS):
                await self._migration.over.wait()

    async def _query_migrate(self, _: Mapping[str, Json]) -> Json:
        if self._migration is None:
            return {}
        return migration_info(self._migration, time.monotonic())


def _address(arguments: Mapping[str, Json]) -> address.Address:
    try:
        return address.of_arguments(arguments)
    except address.AddressError as error:
        raise CommandError(str(error)) from None
