"""What dstd leaves to the dstd after it: how far the guest has come."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from common.errors import HostError
from common.guest.attached import INCOMING
from common.guest.journal import Journal, migration_of_untrusted
from common.store import arriving, parking
from common.stream.constants import MAX_PACKAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.guest.base import Guest
    from common.guest.keeping import Keeping
    from common.qmp.message import Json

RECEIVED: Final = parking.RECEIVED
"""Under which the bitmaps of ram_prepare_destination() are kept."""
PACKAGE: Final = arriving.PACKAGE
"""Under which the device state of a QEMU is kept, which sends it only once."""


class Phase(StrEnum):
    """How far it has come."""

    PRECOPY = "precopy"
    """The guest is the source's."""
    PACKAGED = "packaged"
    """All device state is here. QEMU has given its guest up, srcd has not."""
    LOADED = "loaded"
    """srcd may know that the guest can run here, and gives it up then."""
    RUNNING = "running"
    """It was started here."""
    ARRIVED = "arrived"
    """Precopy is over, and srcd may know that the guest can run here."""
    COMPLETE = "complete"
    """All is here, and the source may not know."""
    TOLD = "told"
    """The source knows, too."""


# The guest may run here, and pages are missing.
POSTCOPY: Final = frozenset({Phase.PACKAGED, Phase.LOADED, Phase.RUNNING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`address` is where it listens (address.to_json); `settings` a snapshot.

    `migration` is the number that srcd has given it, None if it has not.
    """

    phase: Phase = Phase.PRECOPY
    section_id: int = 0
    is_srcd: bool = False
    migration: int | None = None
    address: Mapping[str, Json] | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)

    @property
    def source_has_it(self) -> bool:
        """Whether the guest is the source's for certain."""
        return self.phase is Phase.PRECOPY or (
            self.phase is Phase.PACKAGED and self.is_srcd
        )


def record_of_untrusted(content: Mapping[str, Json]) -> Record:
    """HostError if that is no record."""
    given: Mapping[str, Any] = content
    try:
        record = Record(
            phase=Phase(given["phase"]),
            section_id=int(given["section_id"]),
            is_srcd=bool(given["is_srcd"]),
            migration=migration_of_untrusted(given),
            address=dict(given["address"]) if given["address"] else None,
            settings=dict(given["settings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HostError(
            f"what the guest's process keeps is no record: {error}"
        ) from None
    if not 0 <= record.section_id < 1 << 32:
        raise HostError(f"a kept record of section {record.section_id}")
    return record


def kept_package(keeping: Keeping) -> bytes:
    """What was kept as PACKAGE; HostError if nothing was."""
    if (fd := keeping.find(PACKAGE)) is None:
        raise HostError("the device state of the guest was not kept")
    return os.pread(fd, MAX_PACKAGE, 0)


def new_journal(guest: Guest, keeping: Keeping) -> Journal[Record]:
    """With nothing in it, and nothing kept yet."""
    return Journal(INCOMING, guest, keeping, Record())
