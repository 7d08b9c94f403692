"""The destination's QMP commands: checked arguments in, one call, reply out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from common import status
from common.dirty_rate import DirtyRate
from common.errors import GuestError, HostError
from common.guest.base import GuestState
from common.guest.keeping import Keeping
from common.guest.parking import ParkingGuest
from common.host import journal as journald
from common.qmp.session import CommandError
from common.status import MigrationStatus as M
from dstd.incoming import IncomingMigration
from dstd.record import new_journal, record_of_untrusted
from dstd.report import migration_info

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import trio

    from common import address
    from common.config import ServeConfig
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.monitor import Monitor
    from common.qmp.message import Json
    from common.qmp.server import Handler
    from dstd.record import Record

log = logging.getLogger(__name__)

ARRIVING: Final = frozenset(M) - {M.NONE, M.SETUP, M.COMPLETED, M.FAILED}
POSTCOPY: Final = frozenset({M.POSTCOPY_ACTIVE, M.POSTCOPY_PAUSED, M.POSTCOPY_RECOVER})
PAUSABLE: Final = frozenset({M.POSTCOPY_ACTIVE, M.POSTCOPY_RECOVER})
ARRIVED: Final = frozenset({"running", "paused", "postmigrate"})


class DestinationCommands:
    """Receives the monitor's guest, once.

    `failed` is set when a migration failed that was to end the process.
    """

    def __init__(
        self, monitor: Monitor, config: ServeConfig, nursery: trio.Nursery
    ) -> None:
        self._monitor = monitor
        self._config = config
        self._nursery = nursery
        self._keeping = Keeping(monitor.guest, config.stored)
        self._status = status.incoming()
        self._status.listeners.append(monitor.announce)
        self._migration: IncomingMigration | None = None
        self._stay_stopped = False
        self.failed = False
        self._dirty_rate = DirtyRate(
            monitor.guest, nursery, problem=self._memory_problem
        )
        monitor.settings.postcopy_problem = self._postcopy_problem
        monitor.settings.listening = lambda: self._migration is not None
        monitor.settings.changed = self._note_settings
        monitor.in_postcopy = lambda: self._status.now in POSTCOPY
        monitor.way_on = self._way_on
        monitor.memory_problem = self._memory_problem

    @property
    def handlers(self) -> dict[str, Handler]:
        return {
            **self._monitor.handlers,
            **self._dirty_rate.handlers,
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "migrate-incoming": self._migrate_incoming,
            "migrate-set-capabilities": self._set_capabilities,
            "migrate_set_capability": self._set_capability,
            "migrate-start-postcopy": self._start_postcopy,
            "migrate-continue": self._continue,
            "migrate-pause": self._pause,
            "migrate-recover": self._recover,
            "migrate_cancel": self._cancel,
            "query-migrate": self._query_migrate,
        }

    def _note_settings(self) -> None:
        if self._migration:
            self._migration.note_settings()

    def _postcopy_problem(self) -> str | None:
        migration = self._migration or self._new_migration()
        try:
            return migration.admission.postcopy_problem()
        finally:
            if migration is not self._migration:
                migration.memory.close()

    def _memory_problem(self) -> str | None:
        """Guest memory is not all here before the migration is over."""
        if self._migration and self._status.now is not M.COMPLETED:
            return "guest memory is still arriving; wait until the migration completed"
        return None

    def _new_migration(
        self, journal: Journal[Record] | None = None
    ) -> IncomingMigration:
        return IncomingMigration(
            self._monitor.guest,
            self._monitor.settings,
            self._status,
            self._monitor.emit,
            self._monitor.set_run_state,
            lambda: self._stay_stopped,
            copy=self._config.copy,
            overcommit=self._config.overcommit,
            tuning=self._config.tuning,
            journal=journal,
        )

    async def take_up(self) -> bool:
        """Go on with what a daemon before us has left; False: there is nothing.

        HostError if that daemon still lives, or the guest is of no use any more.
        """
        guest = self._monitor.guest
        journal = new_journal(guest, self._keeping)
        if (content := journal.find()) is None:
            _forget_parts(guest)
            return False
        journal.record = record_of_untrusted(content)
        if journal.record.source_has_it:
            await self._start_anew(journal)
            return False
        self._monitor.settings.restore_untrusted(journal.record.settings)
        journald.begin_migration()
        migration = self._migration = self._new_migration(journal)
        await migration.take_up()
        log.warning(
            "taking up what the daemon before this one has left: %s",
            journal.record.phase,
        )
        if self._status.now is not M.FAILED:
            self._nursery.start_soon(self._run, migration, False)
        return True

    async def _start_anew(self, journal: Journal[Record]) -> None:
        """The source has its guest: what came of it is of no use."""
        guest = self._monitor.guest
        await journal.end()
        _forget_parts(guest)
        if guest.state is not GuestState.INCOMING:
            await guest.quit()
            raise HostError(
                "the guest's process has loaded a guest that runs at the source; it"
                " was ended: start it again, and migrate again"
            )
        migration = self._new_migration()
        try:
            migration.memory.finish()
        finally:
            migration.memory.close()

    async def listen(self, target: address.Address, *, exit_on_error: bool) -> None:
        """Begin to wait for a source; HostError if the address cannot be bound."""
        journald.begin_migration()
        migration = self._new_migration()
        try:
            await migration.listen(target)
        except HostError:
            migration.memory.close()
            raise
        self._migration = migration
        self._nursery.start_soon(self._run, migration, exit_on_error)

    async def _run(self, migration: IncomingMigration, exit_on_error: bool) -> None:
        await migration.run()
        if self._status.now is M.FAILED and exit_on_error:
            self.failed = True
            self._monitor.close()
            self._monitor.quitting.set()

    def _way_on(self) -> str:
        return self._migration.way_on if self._migration else ""

    @property
    def error(self) -> str:
        return str(self._migration.error) if self._migration else ""

    # -- run state

    async def _stop(self, _: Mapping[str, Json]) -> Json:
        if self._monitor.run_state == "inmigrate":
            self._stay_stopped = True
        elif self._monitor.run_state == "running":
            await _checked(self._monitor.stop_guest)
        return None

    async def _cont(self, _: Mapping[str, Json]) -> Json:
        if self._monitor.run_state == "inmigrate":
            self._stay_stopped = False
        elif self._monitor.run_state in ARRIVED - {"running"}:
            await _checked(self._monitor.continue_guest)
        return None

    # -- migration

    async def _migrate(self, arguments: Mapping[str, Json]) -> Json:
        self._monitor.target(arguments)
        if arguments.get("resume"):
            raise CommandError("Cannot resume if there is no paused migration")
        raise CommandError("Guest is waiting for an incoming migration")

    async def _migrate_incoming(self, arguments: Mapping[str, Json]) -> Json:
        if self._migration is not None:
            raise CommandError("The incoming migration has already been started")
        target = self._monitor.target(arguments, incoming=True)
        exit_on_error = bool(arguments.get("exit-on-error", True))
        try:
            await self.listen(
                self._monitor.descriptors.resolve(target), exit_on_error=exit_on_error
            )
        except HostError as error:
            raise CommandError(str(error)) from None
        return None

    async def _recover(self, arguments: Mapping[str, Json]) -> Json:
        if self._migration is None or self._status.now is not M.POSTCOPY_PAUSED:
            raise CommandError(
                "Migrate recover can only be run when postcopy is paused."
            )
        target = self._monitor.target(arguments, incoming=True)
        try:
            await self._migration.recover(self._monitor.descriptors.resolve(target))
        except HostError as error:
            raise CommandError(str(error)) from None
        return None

    async def _pause(self, _: Mapping[str, Json]) -> Json:
        if self._migration is None or self._status.now not in PAUSABLE:
            raise CommandError(
                "migrate-pause is currently only supported during postcopy-active or"
                " postcopy-recover state"
            )
        if not self._migration.pausable:
            raise CommandError("The guest is being handed over; pause in a moment")
        self._migration.pause()
        return None

    async def _set_capabilities(self, arguments: Mapping[str, Json]) -> Json:
        """Not while a guest arrives: to look whether its RAM can be registered
        for faults ends a registration that there is.
        """
        if self._status.now in ARRIVING:
            raise CommandError("There's a migration process in progress")
        return await self._monitor.handlers["migrate-set-capabilities"](dict(arguments))

    async def _set_capability(self, arguments: Mapping[str, Json]) -> Json:
        return await self._set_capabilities({"capabilities": [arguments]})

    async def _start_postcopy(self, _: Mapping[str, Json]) -> Json:
        if not self._monitor.settings.on("postcopy-ram"):
            raise CommandError(
                "Enable postcopy with migrate_set_capability before the start of"
                " migration"
            )
        raise CommandError("Postcopy must be started after migration has been started")

    async def _continue(self, arguments: Mapping[str, Json]) -> Json:
        """There is no outgoing migration here."""
        if arguments["state"] != M.NONE:
            raise CommandError(f"Migration not in expected state: {M.NONE}")
        return None

    async def _cancel(self, _: Mapping[str, Json]) -> Json:
        """QEMU looks at outgoing migrations only, and so do scripts."""
        return None

    async def _query_migrate(self, _: Mapping[str, Json]) -> Json:
        return migration_info(self._migration) if self._migration else {}


async def _checked(change: Callable[[], Awaitable[None]]) -> None:
    try:
        await change()
    except GuestError as error:
        raise CommandError(str(error)) from None


def _forget_parts(guest: Guest) -> None:
    """What came of a VM that is the source's still is of no use."""
    if isinstance(guest, ParkingGuest) and guest.blocks:
        guest.start_anew()
