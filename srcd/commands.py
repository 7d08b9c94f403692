"""The source's QMP commands: checked arguments in, one call, reply out."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import trio

from common import address, status
from common.dirty_rate import DirtyRate
from common.errors import MigrationError
from common.guest.keeping import Keeping
from common.guest.stored import StoredGuest
from common.host import journal as journald
from common.qmp.session import CommandError
from common.status import MigrationStatus as M
from common.tuning import USUAL, Tuning
from srcd.outgoing import OutgoingMigration
from srcd.record import (
    Phase,
    gone_to,
    mark_of,
    new_journal,
    record_of_untrusted,
)
from srcd.recovery import AutomaticRecovery
from srcd.report import migration_info
from srcd.written import Written

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.guest.journal import Journal
    from common.monitor import Monitor
    from common.qmp.message import Json
    from common.qmp.server import Handler
    from srcd.record import Record

log = logging.getLogger(__name__)

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
PAUSABLE: Final = frozenset({M.POSTCOPY_ACTIVE, M.POSTCOPY_RECOVER})
# The order is refused in the end unless the attempt is one of automatic recovery.
RESUMABLE: Final = POSTCOPY - {M.POSTCOPY_ACTIVE}


class SourceCommands:
    """Migrates the monitor's guest away, one migration at a time."""

    def __init__(
        self,
        monitor: Monitor,
        nursery: trio.Nursery,
        *,
        track: bool = True,
        preempt_early: bool = False,
        tuning: Tuning = USUAL,
        stored: Mapping[str, int] | None = None,
    ) -> None:
        self._monitor = monitor
        self._keeping = Keeping(monitor.guest, stored)
        self._nursery = nursery
        self._preempt_early = preempt_early
        self._tuning = tuning
        self._track = track
        self._status = status.outgoing()
        self._status.listeners.append(monitor.announce)
        self._migration: OutgoingMigration | None = None
        self._recovery: AutomaticRecovery
        self._dirty_rate = DirtyRate(
            monitor.guest, nursery, writes=self._writes, problem=self._in_progress
        )
        monitor.settings.changed = self._settings_changed
        monitor.before_end = self._let_go
        monitor.in_postcopy = lambda: self._status.now in POSTCOPY
        monitor.way_on = lambda: self._keeping.way_on

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

    def _emit(self, name: str, data: Mapping[str, Json] | None) -> None:
        if name != "MIGRATION_PASS" or self._monitor.settings.on("events"):
            self._monitor.emit(name, data)

    def _settings_changed(self) -> None:
        if self._migration:
            self._migration.settings_changed()
            self._recovery.settings_changed()

    def _writes(self) -> Written | None:
        return Written.of(self._monitor.guest) if self._track else None

    def _in_progress(self) -> str | None:
        if self._status.now in IN_PROGRESS:
            return "There's a migration process in progress"
        return None

    def _check_idle(self) -> None:
        if problem := self._in_progress():
            raise CommandError(problem)

    # -- after a daemon before us

    async def take_up(self) -> None:
        """Go on with what a daemon before us has left, if anything.

        HostError if that daemon still lives, GuestError if the guest cannot go on.
        """
        guest = self._monitor.guest
        journal = new_journal(guest, self._keeping)
        content = journal.find()
        record = record_of_untrusted(content) if content else None
        if isinstance(guest, StoredGuest):
            record = await self._of_parked(guest, record, journal)
        if record is None:
            return
        journal.record = record
        if record.guest_is_here:
            await self._keep_guest(record, journal)
            return
        if record.settings:
            self._monitor.settings.restore_untrusted(record.settings)
        log.warning(
            "taking up what the daemon before this one has left: %s", record.phase
        )
        journald.begin_migration()
        migration = self._migration = self._new_migration(journal)
        migration.take_up()
        self._recovery = AutomaticRecovery(migration, self._emit)
        self._nursery.start_soon(self._run, migration, None)

    async def _of_parked(
        self, guest: StoredGuest, record: Record | None, journal: Journal[Record]
    ) -> Record | None:
        """What there is to go on with; its mark may not have got as far as a record.

        HostError if the VM runs elsewhere and needs nothing from here.
        """
        if guest.mark:
            record = gone_to(guest.mark, record)
        if record is None:
            return None
        if guest.clone:
            over = record.phase is Phase.COMPLETED
        else:
            mark = mark_of(record)
            if mark and not (guest.mark and mark.pending):
                await trio.to_thread.run_sync(guest.mark_gone, mark)
            # It refused, and the mark was taken away.
            over = record.phase is Phase.PACKAGED and not record.is_dstd
            over = over or bool(mark and not mark.pending)
        if over:
            await journal.end()
            guest.check_elsewhere()
        return None if over else record

    async def _keep_guest(self, record: Record, journal: Journal[Record]) -> None:
        """The migration is over; the guest goes on as it was before."""
        if record.phase is not Phase.HERE and record.was_running:
            log.warning("the daemon before this one ended when the guest was stopped")
            await self._monitor.continue_guest()
        await journal.end()

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
        target = self._monitor.target(arguments)
        if arguments.get("resume"):
            return await self._resume(target)
        self._check_idle()
        if self._monitor.run_state == "postmigrate":
            raise CommandError(
                "Can't migrate the vm that was paused due to previous migration"
            )
        await self._dirty_rate.abandon()
        journald.begin_migration()
        migration = self._migration = self._new_migration()
        self._recovery = AutomaticRecovery(migration, self._emit)
        self._status.set(M.SETUP)
        target = self._monitor.descriptors.resolve(target)
        self._nursery.start_soon(self._run, migration, target)
        if isinstance(target, address.Fd | address.File | address.Exec):
            # These are opened without waiting, so the reply can tell.
            await migration.opened.wait()
            if self._status.now is M.FAILED:
                raise CommandError(str(migration.error))
        return None

    async def _run(
        self, migration: OutgoingMigration, target: address.Address | None
    ) -> None:
        """With what recovers it, as long as it lasts."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._recovery.run)
            await migration.run(target)
            nursery.cancel_scope.cancel()

    def _new_migration(
        self, journal: Journal[Record] | None = None
    ) -> OutgoingMigration:
        try:
            return OutgoingMigration(
                self._monitor.guest,
                self._monitor.settings,
                self._status,
                self._emit,
                self._monitor.set_run_state,
                track=self._track,
                preempt_early=self._preempt_early,
                tuning=self._tuning,
                journal=journal or new_journal(self._monitor.guest, self._keeping),
            )
        except MigrationError as error:
            raise CommandError(str(error)) from None

    async def _resume(self, target: address.Address) -> Json:
        if self._migration is None or self._status.now not in RESUMABLE:
            raise CommandError("Cannot resume if there is no paused migration")
        if isinstance(target, address.File | address.Exec):
            raise CommandError(f"Cannot resume at '{target}': nobody answers there")
        await self._recovery.give_way()
        if self._status.now is not M.POSTCOPY_PAUSED:
            raise CommandError("Cannot resume if there is no paused migration")
        self._migration.resume(self._monitor.descriptors.resolve(target))
        return None

    async def _migrate_incoming(self, _: Mapping[str, Json]) -> Json:
        raise CommandError("'-incoming' was not specified on the command line")

    async def _recover(self, _: Mapping[str, Json]) -> Json:
        raise CommandError("Migrate recover can only be run when postcopy is paused.")

    async def _set_capabilities(self, arguments: Mapping[str, Json]) -> Json:
        self._check_idle()
        return await self._monitor.handlers["migrate-set-capabilities"](dict(arguments))

    async def _set_capability(self, arguments: Mapping[str, Json]) -> Json:
        return await self._set_capabilities({"capabilities": [arguments]})

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

    async def _continue(self, arguments: Mapping[str, Json]) -> Json:
        if arguments["state"] != self._status.now:
            raise CommandError(f"Migration not in expected state: {self._status.now}")
        if self._migration and self._status.now is M.PRE_SWITCHOVER:
            self._migration.proceed()
        return None

    async def _pause(self, _: Mapping[str, Json]) -> Json:
        if self._migration is None or self._status.now not in PAUSABLE:
            raise CommandError(
                "migrate-pause is currently only supported during postcopy-active or"
                " postcopy-recover state"
            )
        if not self._migration.pausable:
            raise CommandError("The guest is being handed over; pause in a moment")
        self._recovery.hold()
        self._migration.pause()
        return None

    async def _cancel(self, _: Mapping[str, Json]) -> Json:
        if self._status.now in POSTCOPY:
            raise CommandError("Postcopy migration in progress, cannot cancel.")
        if self._status.may(M.CANCELLING) and not self._let_go():
            raise CommandError("The guest is being handed over, cannot cancel any more")
        return None

    def _let_go(self) -> bool:
        """Begin to take the guest back, if it is still ours."""
        if self._migration is None or not self._status.may(M.CANCELLING):
            return False
        if not self._migration.cancellable:
            return False
        self._status.set(M.CANCELLING)
        self._migration.cancel()
        return True

    async def give_up(self) -> None:
        """The daemon ends: a guest that is still ours goes on where it is."""
        self._let_go()
        if self._migration and self._status.now is M.CANCELLING:
            with trio.move_on_after(GIVE_UP_SECONDS):
                await self._migration.over.wait()

    async def _query_migrate(self, _: Mapping[str, Json]) -> Json:
        if self._migration is None:
            return {}
        recovery = self._recovery.figures()
        return migration_info(self._migration, time.monotonic(), recovery)
