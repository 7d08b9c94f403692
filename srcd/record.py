"""What srcd leaves to the srcd after it: whose the guest is."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from common import address
from common.errors import HostError
from common.guest.journal import Journal, migration_of_untrusted
from common.guest.stored import Mark
from common.stream.constants import MIGRATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.guest.base import Guest
    from common.guest.keeping import Keeping
    from common.qmp.message import Json

OUTGOING: Final = "outgoing"
"""Under which the record is kept."""


class Phase(StrEnum):
    """How far it has gone."""

    HERE = "here"
    """The guest is ours and goes on, whatever happens."""
    STOPPED = "stopped"
    """Ours still, and stopped for the migration."""
    PACKAGED = "packaged"
    """A QEMU may have got its device state, and run it."""
    GONE = "gone"
    """It is the destination's. In postcopy pages are missing there."""
    COMPLETED = "completed"
    """And all of them are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`address` is the destination's (address.to_json); `settings` a snapshot.

    `migration` is the number by which a dstd knows it again, None of one that was
    begun without.
    """

    phase: Phase = Phase.HERE
    was_running: bool = False
    postcopy: bool = False
    is_dstd: bool = False
    migration: int | None = None
    preempt: bool | None = None  # None: not known
    preempt_early: bool = False
    address: Mapping[str, Json] | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)

    @property
    def guest_is_here(self) -> bool:
        """dstd does not run it before it has read that it is given up."""
        if self.phase is Phase.PACKAGED:
            return self.is_dstd
        return self.phase in (Phase.HERE, Phase.STOPPED)


def record_of_untrusted(content: Mapping[str, Json]) -> Record:
    """HostError if that is no record."""
    given: Mapping[str, Any] = content
    try:
        return Record(
            phase=Phase(given["phase"]),
            was_running=bool(given["was_running"]),
            postcopy=bool(given["postcopy"]),
            is_dstd=bool(given["is_dstd"]),
            migration=migration_of_untrusted(given),
            preempt=given["preempt"],
            preempt_early=bool(given["preempt_early"]),
            address=dict(given["address"]) if given["address"] else None,
            settings=dict(given["settings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HostError(
            f"what the guest's process keeps is no record: {error}"
        ) from None


def new_migration() -> int:
    """The number of a migration that begins."""
    return secrets.randbelow(MIGRATIONS)


def gone_to(mark: Mark, record: Record | None) -> Record:
    """What the mark of a parked VM says is so, whatever else was kept.

    But what was completed stays so: the mark is changed behind the record.
    """
    if record and record.phase is Phase.COMPLETED:
        return record
    known = record or Record()
    return replace(known, phase=Phase.GONE, postcopy=True, is_dstd=mark.dstd)


def mark_of(record: Record) -> Mark | None:
    """The mark that a parked VM needs by what was kept; None: it is here.

    A QEMU gets none before there is a mark, and that goes before the record does.
    """
    if record.phase not in (Phase.GONE, Phase.COMPLETED):
        return None
    pending = record.postcopy and record.phase is Phase.GONE
    target = address.of_json_untrusted(record.address)
    return Mark(str(target or "an unknown address"), record.is_dstd, pending)


def new_journal(guest: Guest, keeping: Keeping) -> Journal[Record]:
    """With nothing in it, and nothing kept yet."""
    return Journal(OUTGOING, guest, keeping, Record())
