"""Files that outlive this process, for the daemon after it.

The guest's process keeps them (`keep` of the attach protocol). What it cannot
keep, or if there is no such process, the service manager does, if there is one.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.errors import GuestError, HostError
from common.host.systemd import STORED, Notifier
from common.qmp import message
from common.store import files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.guest.base import Guest
    from common.qmp.message import Json

log = logging.getLogger(__name__)

_KEPT: Final = ".kept"
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Keeping:
    """What is kept of one guest; `stored` came from the service manager."""

    def __init__(self, guest: Guest, stored: Mapping[str, int] | None = None) -> None:
        self._guest = guest
        self._stored = dict(stored or {})
        self._guest_keeps = not stored
        self._notifier = Notifier()

    @property
    def way_on(self) -> str:
        """What there is to do if this process ends while something is kept."""
        if self._guest_keeps:
            return "start again, and recover"
        if self._notifier.heard:
            return (
                "systemd alone keeps what the next daemon needs, and lets go of it"
                " when the unit is stopped; after `restart` recover, after `stop` the"
                " guest is lost"
            )
        return "nobody keeps what the next daemon needs; the guest is lost"

    def find(self, name: str) -> int | None:
        """What a process before this one had kept; not the caller's to close."""
        found = self._guest.kept.get(name)
        return self._stored.get(name) if found is None else found

    def make(self, name: str, length: int) -> int:
        """A file of zeroes that can be kept; the caller closes it."""
        return self._guest.make_kept(name, length)

    async def keep(self, name: str, fd: int) -> None:
        """Have it kept from now on, in the place of one with the same name.

        GuestError only if the guest's process is gone.
        """
        try:
            await self._guest.keep(name, fd)
        except GuestError as error:
            if self._guest.is_gone:
                raise
            log.warning("the guest's process keeps nothing: %s", error)
            self._guest_keeps = False
            self._notifier.discard(STORED + name)
            self._notifier.store(STORED + name, [fd])

    async def keep_content(self, name: str, content: bytes) -> None:
        """Have a file with this content kept; HostError, or GuestError as above."""
        fd = self.make(name, len(content))
        try:
            _write(fd, name, content)
            await self.keep(name, fd)
        finally:
            os.close(fd)

    async def forget(self, name: str) -> None:
        """Nobody needs it any more."""
        self._notifier.discard(STORED + name)
        await self._guest.forget(name)


def _write(fd: int, name: str, content: bytes) -> None:
    try:
        written = os.pwrite(fd, content, 0)
    except OSError as error:
        raise HostError(f"no room to keep {name} in: {error.strerror}") from None
    if written != len(content):
        raise HostError(f"no room to keep {name} in")


def memory_file(name: str, length: int) -> int:
    """A memfd of fixed length: nobody can cut it off under a mapping of ours."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags)
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise HostError(f"no memory to keep {name} in: {error.strerror}") from None
    return fd


def check_kept(fd: int, length: int) -> None:
    """HostError if a mapping of the file might lose its memory (SIGBUS)."""
    status = os.fstat(fd)
    if status.st_size < length:
        raise HostError(f"a kept file has {status.st_size} bytes, expected {length}")


def identity(guest: Guest) -> str:
    """By which a guest is known again: its blocks, and the files behind them.

    Those of a guest that outlives the host may get other numbers.
    """
    digest = hashlib.sha256()
    for block in guest.blocks:
        facts: list[Json] = [block.idstr, block.length, block.base]
        if not guest.outlives_host:
            status = os.fstat(block.fd)
            facts += [status.st_dev, status.st_ino]
        digest.update(message.encode(facts))
    return digest.hexdigest()


class KeptFiles:
    """Files of the file system: PREFIX.NAME. `found` are those of before."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.found: dict[str, int] = {}
        for name in self._names():
            path = Path(self._path(name))
            with files.named(path, "open"):
                self.found[name] = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def _names(self) -> list[str]:
        paths = glob.glob(f"{glob.escape(self._prefix)}.*{_KEPT}")
        start = f"{self._prefix}."
        return [path.removeprefix(start).removesuffix(_KEPT) for path in paths]

    def _path(self, name: str) -> str:
        return f"{self._prefix}.{name}{_KEPT}"

    def make(self, name: str, length: int) -> int:
        """A new file of zeroes that has its room; HostError. The caller closes it."""
        self.forget(name)
        return files.create_solid(Path(self._path(name)), length)

    def forget(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))
        if name in self.found:
            os.close(self.found.pop(name))

    def forget_all(self) -> None:
        for name in self._names():
            self.forget(name)

    def close(self) -> None:
        """The files stay."""
        for fd in self.found.values():
            os.close(fd)
        self.found.clear()
