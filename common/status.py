"""Where a migration stands: two statuses, one phase, and what may follow what.

All transitions live in this file and only here. The flow does not: it is an
async function in outgoing.py and incoming.py that reads from top to bottom,
and the tables guard it. To add a status, add it to the enum and to every table
it belongs to; tests/unit/test_status.py fails until a test has been there.

The strings are QEMU's, because QMP clients compare them. QEMU's enum has three
more that we never enter: wait-unplug, colo, and since 10.2 postcopy-device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Final, Generic, TypeVar

_log = logging.getLogger(__name__)


class MigrationStatus(StrEnum):
    """What query-migrate reports and the MIGRATION event carries."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"  # QEMU 9.1 and later
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"


class PostcopyState(StrEnum):
    """How far the source's postcopy commands have brought a destination."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    RUNNING = "running"
    END = "end"


S = TypeVar("S", bound=StrEnum)
Table = Mapping[S, frozenset[S]]
M = MigrationStatus
P = PostcopyState


def _table(states: Iterable[S], rows: Mapping[S, set[S]]) -> Table[S]:
    """Complete the rows: a state without one leads nowhere."""
    return {state: frozenset(rows.get(state, ())) for state in states}


# From NONE a daemon goes to whatever one before it had come to when it died.
#
# DEVICE is the last status from which the guest can go on at the source. It
# becomes POSTCOPY_ACTIVE only after PONG 3 has proven that the destination has
# loaded the package; a failure before that is FAILED, and nothing is lost. QEMU
# notices one in PRE_SWITCHOVER only when it goes on; we say so at once.
OUTGOING: Final = _table(
    M,
    {
        M.NONE: {M.SETUP, M.POSTCOPY_PAUSED, M.COMPLETED, M.FAILED},
        M.SETUP: {M.ACTIVE, M.CANCELLING, M.FAILED},
        M.ACTIVE: {M.PRE_SWITCHOVER, M.DEVICE, M.CANCELLING, M.FAILED},
        M.PRE_SWITCHOVER: {M.DEVICE, M.CANCELLING, M.FAILED},
        M.DEVICE: {M.COMPLETED, M.POSTCOPY_ACTIVE, M.CANCELLING, M.FAILED},
        M.POSTCOPY_ACTIVE: {M.COMPLETED, M.POSTCOPY_PAUSED, M.FAILED},
        M.POSTCOPY_PAUSED: {M.POSTCOPY_RECOVER_SETUP},
        M.POSTCOPY_RECOVER_SETUP: {M.POSTCOPY_RECOVER, M.POSTCOPY_PAUSED},
        M.POSTCOPY_RECOVER: {M.POSTCOPY_ACTIVE, M.POSTCOPY_PAUSED},
        M.CANCELLING: {M.CANCELLED},
        M.COMPLETED: {M.SETUP},
        M.CANCELLED: {M.SETUP},
        M.FAILED: {M.SETUP},
    },
)

# The three postcopy statuses may fail here although they never do in QEMU: our
# guest lives in a process of its own, and dies with it.
INCOMING: Final = _table(
    M,
    {
        M.NONE: {M.SETUP},
        M.SETUP: {M.ACTIVE},
        M.ACTIVE: {M.COMPLETED, M.POSTCOPY_ACTIVE, M.FAILED},
        M.POSTCOPY_ACTIVE: {M.COMPLETED, M.POSTCOPY_PAUSED, M.FAILED},
        M.POSTCOPY_PAUSED: {M.POSTCOPY_RECOVER, M.FAILED},
        M.POSTCOPY_RECOVER: {M.POSTCOPY_ACTIVE, M.POSTCOPY_PAUSED, M.FAILED},
    },
)

# END from anywhere but NONE: a migration that was advised may still complete in
# precopy or fail. Further discards stay in DISCARD and are not a change.
POSTCOPY: Final = _table(
    P,
    {
        P.NONE: {P.ADVISE},
        P.ADVISE: {P.DISCARD, P.LISTENING, P.END},
        P.DISCARD: {P.LISTENING, P.END},
        P.LISTENING: {P.RUNNING, P.END},
        P.RUNNING: {P.END},
    },
)


class IllegalTransition(RuntimeError):
    """A status was set that may not follow the present one: a bug of ours."""


class StatusMachine(Generic[S]):
    """One status, guarded by its table and watched by its listeners.

    `listeners` are called with (old, new) in order, after the change; they must
    not raise. A peer that asks for an illegal step is not a bug: ask `may`
    first and raise StreamError.
    """

    def __init__(self, table: Table[S], initial: S) -> None:
        self._table = table
        self._now = initial
        self.listeners: list[Callable[[S, S], None]] = []

    @property
    def now(self) -> S:
        return self._now

    def may(self, new: S) -> bool:
        """Whether `new` may follow the present status."""
        return new in self._table[self._now]

    def set(self, new: S) -> None:
        """Change to `new`; IllegalTransition, and no change, if it may not follow."""
        old = self._now
        if not self.may(new):
            raise IllegalTransition(f"{old} cannot become {new}")
        self._now = new
        _log.info("status %s becomes %s", old, new, extra={"old": old, "new": new})
        for listener in self.listeners:
            listener(old, new)


def outgoing() -> StatusMachine[MigrationStatus]:
    return StatusMachine(OUTGOING, MigrationStatus.NONE)


def incoming() -> StatusMachine[MigrationStatus]:
    return StatusMachine(INCOMING, MigrationStatus.NONE)


def postcopy() -> StatusMachine[PostcopyState]:
    return StatusMachine(POSTCOPY, PostcopyState.NONE)
