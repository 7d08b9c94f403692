"""Automatic recovery: a paused postcopy is resumed without being asked.

One task beside each migration. It acts on what pauses by itself; what the
operator paused with `migrate-pause` is his until he resumes. The waits double
from attempt to attempt, and are counted anew when the destination has received
something since: a connection that only ever comes back does not count.
"""

from __future__ import annotations

import logging
import math
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import trio

from common import address
from common.errors import ChannelLost
from common.recovery import Policy
from common.status import MigrationStatus as M

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.qmp.message import Json
    from srcd.outgoing import OutgoingMigration

log = logging.getLogger(__name__)

EVENT: Final = "X_POSTCOPYD_RECOVERY"
# How long an attempt that is broken off may take to end.
GIVE_WAY_SECONDS: Final = 10.0


class State(StrEnum):
    """What automatic recovery is at; `query-migrate` shows it."""

    OFF = "off"
    READY = "ready"  # postcopy is not paused
    WAITING = "waiting"  # for the time of the next attempt
    TRYING = "trying"
    HELD = "held"  # the operator has paused it
    GIVEN_UP = "given-up"


class AutomaticRecovery:
    """Of one migration; `emit` sends a QMP event.

    `attempts` and `recovered` count what it did, over all pauses.
    """

    def __init__(
        self,
        migration: OutgoingMigration,
        emit: Callable[[str, Mapping[str, Json] | None], None],
    ) -> None:
        self.attempts = 0
        self.recovered = 0
        self._migration = migration
        self._emit = emit
        self._in_a_row = 0  # attempts since the destination received something
        self._left = math.inf  # bytes it lacked when postcopy went on last
        self._held = False
        self._trying = False
        self._gave_up = False
        self._auto = self._policy.auto
        self._news = trio.lowlevel.ParkingLot()

    @property
    def _policy(self) -> Policy:
        return Policy.of(self._migration.settings)

    @property
    def state(self) -> State:
        if not self._policy.auto:
            return State.OFF
        if self._trying:
            return State.TRYING
        if self._migration.status.now is not M.POSTCOPY_PAUSED:
            return State.READY
        if self._held:
            return State.HELD
        return State.GIVEN_UP if self._hopeless else State.WAITING

    @property
    def _hopeless(self) -> str | None:
        """Why there is no further attempt."""
        target = self._migration.address
        if target and not address.takes_many(target):
            return f"'{target}' cannot be connected to a second time"
        if self._policy.exhausted(self._in_a_row):
            return f"{self._in_a_row} attempts in a row"
        return None

    def figures(self) -> Mapping[str, Json]:
        return {
            "state": self.state,
            "address": str(self._migration.address or ""),
            "attempts": self.attempts,
            "recovered": self.recovered,
        }

    # -- what happens outside

    def hold(self) -> None:
        """The operator pauses it."""
        self._held = True
        self._news.unpark_all()

    async def give_way(self) -> None:
        """The operator is about to resume; an attempt that is under way ends."""
        self._held = True
        if self._trying:
            self._migration.abandon()
            with trio.move_on_after(GIVE_WAY_SECONDS):
                await self._until(lambda: not self._trying)
        self._begin_anew()

    def settings_changed(self) -> None:
        """Switched on while it is paused, it begins."""
        before, self._auto = self._auto, self._policy.auto
        if self._auto and not before:
            self._begin_anew()
        self._look()

    def _begin_anew(self) -> None:
        self._held = self._gave_up = False
        self._in_a_row = 0

    def _status_changed(self, old: M, new: M) -> None:
        if new is M.POSTCOPY_ACTIVE:
            self._goes_on()
        elif new is M.POSTCOPY_PAUSED and self._trying:
            self._trying = False
            self._tell("failed", **self._error())
        self._look()

    def _goes_on(self) -> None:
        if self._trying:
            self._trying = False
            self.recovered += 1
            self._tell("recovered")
        left = self._migration.pump.remaining_bytes()
        if left < self._left:
            self._begin_anew()
        self._left = left

    def _look(self) -> None:
        """Something has changed: this may be the end of trying, or the beginning."""
        if self.state is State.GIVEN_UP and not self._gave_up:
            self._gave_up = True
            before = f"{self._migration.error}; " if self._migration.error else ""
            self._migration.error = ChannelLost(
                f"{before}automatic recovery has given up: {self._hopeless};"
                " `migrate` with `resume` goes on"
            )
            self._tell("given-up", **self._error())
        self._news.unpark_all()

    # -- the task

    async def run(self) -> None:
        """Recover as often as it pauses, until cancelled."""
        listeners = self._migration.status.listeners
        listeners.append(self._status_changed)
        try:
            self._look()
            while True:
                await self._until(lambda: self.state is State.WAITING)
                await self._attempt()
        finally:
            listeners.remove(self._status_changed)

    async def _attempt(self) -> None:
        """Wait, and resume unless something else has come in between."""
        delay = self._policy.delay(self._in_a_row + 1)
        self._tell("planned", delay=delay)
        with trio.move_on_after(delay):
            await self._until(lambda: self.state is not State.WAITING)
        target = self._migration.address
        if self.state is not State.WAITING or not target:
            return
        self._in_a_row += 1
        self.attempts += 1
        self._trying = True
        self._migration.resume(target)

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._news.park()

    # -- telling

    def _tell(self, result: str, **more: Json) -> None:
        """The attempt that is planned is the one behind those that were made."""
        attempt = self._in_a_row + (result == "planned")
        log.info("automatic recovery: attempt %d %s %s", attempt, result, more)
        self._emit(EVENT, {"attempt": attempt, "result": result, **more})

    def _error(self) -> dict[str, Json]:
        return {"error-desc": str(self._migration.error)}
