"""A guest that is being put into a directory: any machine, any RAM blocks.

What it is made of is what the stream says. It never runs here: it becomes a
parked VM with `commit`, and before that it is an incomplete directory, which a
later process can take up again.
"""

from __future__ import annotations

import logging
import os
import resource
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from common.errors import GuestError, HostError
from common.guest.base import Device, GuestState, RamBlock
from common.store.directory import Parking
from common.stream.constants import TARGET_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from common.stream.section import BlockEntry

log = logging.getLogger(__name__)

# Each block's file, its bitmaps, and room for a few more.
_DESCRIPTORS_PER_BLOCK: Final = 12
_DESCRIPTORS_BESIDES: Final = 256


class ParkingGuest:
    """`directory` is where it goes: new or empty, or one that is incomplete.

    An incomplete one keeps what it has, and `blocks` are its blocks then. HostError
    if the directory cannot be used.

    `irreplaceable`: nobody else has the VM any more, complete or not. What is
    not is thrown away by `quit`.
    """

    device: Device | None = None
    userfaultfd: int | None = None
    pagemap: int | None = None
    no_userfaultfd: str | None = None
    vcpus: Sequence[int] = ()
    abilities = 0
    is_gone = False
    outlives_host = True

    def __init__(self, directory: str) -> None:
        again = Parking.is_left(directory)
        self._parking = (
            Parking.reopen(directory) if again else Parking.create(directory, anew=True)
        )
        self.directory = directory
        self.machine = ""
        self.state = GuestState.INCOMING
        self.irreplaceable = again
        self.blocks: Sequence[RamBlock] = self._opened()
        self.kept: Mapping[str, int] = {
            name: self._parking.open_kept(name) for name in self._parking.kept
        }

    def _opened(self) -> tuple[RamBlock, ...]:
        """Nobody runs on it: the pages that are placed are those of the stream."""
        return tuple(
            RamBlock(
                idstr=block.name,
                length=block.length,
                page_size=TARGET_PAGE_SIZE,
                base=0,
                guest_address=0,
                fd=fd,
            )
            for block, fd in zip(self._parking.blocks, self._parking.fds, strict=True)
        )

    # -- what the stream says

    def room(self) -> int | None:
        """Bytes that the file system has for it; None where it does not say."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    async def adopt(
        self, configuration: bytes, blocks: Sequence[BlockEntry], *, advised: bool
    ) -> None:
        """Make these blocks, of zeroes; HostError if the file system refuses."""

        def make() -> None:
            self._parking.set_configuration(configuration, advised=advised)
            _allow_descriptors(len(blocks))
            for block in blocks:
                page_size = block.page_size or TARGET_PAGE_SIZE
                self._parking.add_block(block.idstr, block.length, page_size)

        await trio.to_thread.run_sync(make)
        self.blocks = self._opened()

    async def set_early(self, sections: bytes) -> None:
        """Device state in front of RAM's pages, verbatim."""
        await trio.to_thread.run_sync(self._parking.set_early, sections)

    async def commit(
        self, sections: bytes, description: bytes | None, run_state: str, origin: str
    ) -> None:
        """All is here: a parked VM, on the disk, when this returns.

        HostError otherwise; nothing is lost then, and it may be tried again.
        """
        await self._parking.commit(sections, description, run_state, origin)
        self.state = GuestState.PAUSED

    def upstream(self) -> AbstractContextManager[int]:
        """It is ours now, and may be served: a socket at which that asks for pages."""
        return self._parking.upstream()

    def let_go(self) -> None:
        """It is parked, and any process may serve it."""
        self.close()

    # -- what a process after this one needs

    def make_kept(self, name: str, length: int) -> int:
        """A file that is in the directory until `commit`."""
        self._close_kept(name)
        return self._parking.keep(name, length)

    async def keep(self, name: str, fd: int) -> None:
        """It is kept since it was made; from now on the host may go down as well."""
        await trio.to_thread.run_sync(self._parking.secure, name, fd)

    async def forget(self, name: str) -> None:
        self._parking.forget(name)
        self._close_kept(name)

    def start_anew(self) -> None:
        """What came is of no use: the directory is empty again, and `blocks` too."""
        self._parking.discard()
        self.close()
        self._parking = Parking.create(self.directory)
        self.state = GuestState.INCOMING
        self.irreplaceable = False

    def _close_kept(self, name: str) -> None:
        left = dict(self.kept)
        with suppress(KeyError):
            os.close(left.pop(name))
        self.kept = left

    # -- the guest's interface

    async def wait_gone(self) -> NoReturn:
        while True:
            await trio.sleep_forever()

    async def stop(self) -> None:
        """It does not run."""

    async def cont(self) -> None:
        raise GuestError(
            "this guest is being parked and cannot run here; serve it with"
            f" srcd serve --parked {self.directory}",
            request="cont",
        )

    async def save(self) -> bytes:
        return b""

    async def load(self, device: Device, state: bytes) -> None:
        raise GuestError("a guest that is being parked loads nothing", request="load")

    async def quit(self) -> None:
        """The end of this process; HostError if the files cannot be removed."""
        if not self.irreplaceable:
            await trio.to_thread.run_sync(self._parking.discard)
        elif self.state is GuestState.INCOMING:
            log.warning("%s is incomplete, and nobody else may have it", self.directory)
        self.close()

    def close(self) -> None:
        """The files stay."""
        for name in self.kept:
            self._close_kept(name)
        self.blocks = ()
        self._parking.close()


def _allow_descriptors(blocks: int) -> None:
    """Many blocks need more descriptors than a process begins with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = blocks * _DESCRIPTORS_PER_BLOCK + _DESCRIPTORS_BESIDES
    if soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise HostError(
            f"{blocks} RAM blocks need {needed} descriptors and {hard} are allowed;"
            " raise the limit (LimitNOFILE= of the service)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
