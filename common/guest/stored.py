"""A guest that is served from a directory: a parked VM.

Its RAM is in files that nobody writes, its device state is opaque bytes, and it
never runs here: it becomes a running VM in a QEMU that it is migrated to.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, Self

import trio

from common.errors import GuestError, HostError, Unusable
from common.guest.base import Device, GuestState, RamBlock
from common.guest.keeping import KeptFiles
from common.store.arriving import Arriving
from common.store.directory import Parked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

# What QEMU takes for the description of a stream that had none.
NO_DESCRIPTION: Final = b"{}"


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a parked VM has gone: to a QEMU, or to a dstd, at `address`.

    `pending`: some of its memory is still here only.
    """

    address: str
    dstd: bool
    pending: bool

    def __str__(self) -> str:
        there = f"{'dstd' if self.dstd else 'QEMU'} {self.address}"
        return there + (_PENDING if self.pending else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The mark in what `Parked.running` says."""
        place = text.partition(" at ")[2]
        kind, _, address = place.removesuffix(_PENDING).partition(" ")
        return cls(address, kind == "dstd", place.endswith(_PENDING))


_PENDING: Final = ", which still needs memory from here"


def _open(directory: str, *, lazy: bool) -> Parked:
    """A complete one, or one that arrives while it is served."""
    path = Path(directory)
    if not Arriving.is_here(path):
        return Parked.open(path)
    if not lazy:
        raise HostError(
            f"{directory} is incomplete: the VM still arrives; serve it with"
            " --restore lazy, or wait"
        )
    try:
        return Arriving.open(path)
    except HostError:
        if Arriving.is_here(path):
            raise
        return Parked.open(path)  # it has become complete meanwhile


class StoredGuest:
    """The parked VM in `directory`; HostError if that is in use, or not complete
    nor on its way by postcopy.

    Not as a `clone` it runs once: it is refused when it runs elsewhere already,
    unless it still needs memory from here.
    `lazy`: it is to run before its RAM is there. `learns`: what it asks for first
    is remembered for the next time, all of it that comes in `learn_seconds`.
    `beside`: where a clone's files that
    are to outlive the daemon begin; many may be served from one directory.
    """

    device: Device | None = None
    userfaultfd: int | None = None
    pagemap: int | None = None
    no_userfaultfd: str | None = None
    vcpus: Sequence[int] = ()
    abilities = 0
    state = GuestState.PAUSED
    is_gone = False
    outlives_host = False

    def __init__(
        self,
        directory: str,
        *,
        clone: bool,
        lazy: bool,
        learns: bool = True,
        learn_seconds: int = 0,
        beside: str,
    ) -> None:
        _allow_descriptors()
        self.parked = _open(directory, lazy=lazy)
        try:
            self.parked.lock(clone=clone)
            self.mark = None if clone else self._where()
            self.clone = clone
            if self.mark and not self.mark.pending:
                self.check_elsewhere()
            # Of one that runs once, the directory alone is enough to go on with it.
            self._kept = KeptFiles(beside if clone else f"{directory}/serving")
        except HostError:
            self.parked.close()
            raise
        self.machine = self.parked.manifest.machine
        self.lazy = lazy
        self.learns = learns
        self.learn_seconds = learn_seconds
        self.blocks: Sequence[RamBlock] = self._opened()
        was = self.parked.manifest.run_state
        log.info("a parked VM that was %s, machine %s", was, self.machine)
        if isinstance(self.parked, Arriving):
            log.info("it has not wholly arrived, and is passed on as it comes")
        if self.mark:
            log.warning(
                "the VM runs elsewhere, %s: it can be recovered from here, by"
                " migrate-recover there and migrate with resume here",
                self.parked.running,
            )
        elif lazy and was != "running":
            log.warning("the VM was %s: start QEMU with -S to keep it so", was)

    def _where(self) -> Mark | None:
        text = self.parked.running
        return Mark.parse(text) if text else None

    def mark_gone(self, mark: Mark) -> None:
        """As a daemon before us had begun to; HostError."""
        self.parked.mark_running(str(mark))
        self.mark = mark

    def check_elsewhere(self) -> None:
        """Unusable if the VM runs elsewhere, and this is no copy."""
        if not self.clone and (where := self.parked.running):
            raise Unusable(
                f"{self.parked.path}: this VM runs elsewhere, {where}; serve a copy of"
                " it with --clone"
            )

    def _opened(self) -> tuple[RamBlock, ...]:
        rows = zip(self.parked.manifest.blocks, self.parked.blocks(), strict=True)
        return tuple(
            RamBlock(
                idstr=block.name,
                length=block.length,
                page_size=block.page_size,
                base=0,
                guest_address=0,
                fd=fd,
                start=block.offset,
            )
            for block, fd in rows
        )

    @property
    def has_outlived(self) -> bool:
        """Whether a daemon before us has begun to serve it, and not ended that."""
        return bool(self.kept)

    @property
    def kept(self) -> Mapping[str, int]:
        return self._kept.found

    def make_kept(self, name: str, length: int) -> int:
        return self._kept.make(name, length)

    async def keep(self, name: str, fd: int) -> None:
        """It is kept since it was made."""

    async def forget(self, name: str) -> None:
        self._kept.forget(name)

    async def wait_gone(self) -> NoReturn:
        while True:
            await trio.sleep_forever()

    async def stop(self) -> None:
        """It does not run."""

    async def cont(self) -> None:
        raise GuestError(
            "a parked VM cannot run here: migrate it to a QEMU", request="cont"
        )

    async def save(self) -> bytes:
        return self.parked.device_state

    async def load(self, device: Device, state: bytes) -> None:
        raise GuestError("a parked VM is complete and loads nothing", request="load")

    async def quit(self) -> None:
        """It does not run; what serves it still reads its files.

        Whoever ends the serving of a copy does not want it taken up.
        """
        if self.clone:
            self._kept.forget_all()

    def close(self) -> None:
        self._kept.close()
        self.parked.close()
        self.blocks = ()


def _allow_descriptors() -> None:
    """As many as the host lets us have: a VM may have hundreds of RAM blocks."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
