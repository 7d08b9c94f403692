"""What a daemon leaves to the daemon after it, should it die.

A record is written before each step that cannot be taken back. So whoever reads
it knows whose the guest may be at the worst.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from common.errors import HostError
from common.guest.keeping import identity
from common.guest.note import LENGTH, Note
from common.stream.constants import MIGRATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from _typeshed import DataclassInstance

    from common.guest.base import Guest
    from common.guest.keeping import Keeping
    from common.qmp.message import Json

log = logging.getLogger(__name__)


R = TypeVar("R", bound="DataclassInstance")


def migration_of_untrusted(content: Mapping[str, Json]) -> int | None:
    """The number of the migration that a record is of; ValueError if it is none.

    None: it was begun without, perhaps by an older daemon.
    """
    number = content.get("migration")
    if number is None or (isinstance(number, int) and 0 <= number < MIGRATIONS):
        return number
    raise ValueError(f"number of a migration: {number!r}")


class Journal(Generic[R]):
    """One record, kept under `name`.

    Until `begin` or `find` nothing is kept, and `write` only remembers.
    """

    def __init__(self, name: str, guest: Guest, keeping: Keeping, record: R) -> None:
        self.record = record
        self.keeping = keeping
        self._name = name
        self._guest = guest
        self._note: Note | None = None

    async def begin(self) -> None:
        """Keep the record from now on; HostError, or GuestError if the guest is gone.

        Keep first what it speaks of: whoever finds it relies on that.
        """
        fd = self.keeping.make(self._name, LENGTH)
        try:
            self._hold(Note(fd))
            self._save()
            await self.keeping.keep(self._name, fd)
        finally:
            os.close(fd)

    def find(self) -> Mapping[str, Json] | None:
        """What a daemon before us wrote of this very guest; from now on it is ours.

        HostError if that daemon still lives, or if what it wrote of a guest that
        may be nowhere else cannot be read.
        """
        if (fd := self.keeping.find(self._name)) is None:
            return None
        note = Note(fd)
        content = note.read_untrusted()
        if content is None or content.get("guest") != identity(self._guest):
            lost = self._guest.outlives_host and not note.is_blank
            note.close()
            if lost:
                raise HostError(
                    "what a daemon before this one has noted of this VM is damaged:"
                    " if the source has it still, or a copy is elsewhere, remove the"
                    " directory"
                )
            return None
        self._hold(note)
        return content

    def write(self, **changes: object) -> None:
        """Change members of the record."""
        self.record = replace(self.record, **changes)
        if self._note:
            self._save()

    async def settle(self) -> None:
        """What was written holds over the end of the host, too, if the guest does."""
        if self._note and self._guest.outlives_host:
            await trio.to_thread.run_sync(self._note.sync)

    async def end(self) -> None:
        """Whoever comes after us need not know of it."""
        if self._note:
            self.close()
            await self.keeping.forget(self._name)

    def close(self) -> None:
        """Let go; what is kept stays so."""
        if self._note:
            self._note.close()
            self._note = None

    def _hold(self, note: Note) -> None:
        self.close()
        self._note = note

    def _save(self) -> None:
        assert self._note is not None
        self._note.write({"guest": identity(self._guest), **asdict(self.record)})
