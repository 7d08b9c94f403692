"""A guest as the daemons see it: RAM blocks, device state, stop and continue."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class GuestState(StrEnum):
    """What a guest's process does with the vCPUs; the words of the attach protocol."""

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"


@dataclass(frozen=True, slots=True, kw_only=True)
class RamBlock:
    """One named piece of guest RAM behind the descriptor `fd`; sizes in bytes.

    `base` is where the guest's process maps it, 0 if no process does. `start` is
    where it begins in the file, and not 0 for stored RAM alone.
    """

    idstr: str
    length: int
    page_size: int
    base: int
    guest_address: int
    fd: int
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Name and version of the format in which a guest saves its device state."""

    name: str
    version: int


def file_page_size(fd: int) -> int:
    """The size of the pages behind a file: f_bsize on hugetlbfs, else ordinary."""
    size = os.fstatvfs(fd).f_bsize
    return size if size > 1 << 20 else 4096


class Guest(Protocol):
    """The interface that both kinds of guest have.

    The methods raise GuestError when the guest's process refuses or is gone.
    """

    machine: str
    blocks: Sequence[RamBlock]
    vcpus: Sequence[int]
    state: GuestState
    abilities: int
    """UFFD_CAN_… mask of what the userfaultfd was negotiated for."""

    @property
    def device(self) -> Device | None:
        """None: the guest has no device state."""

    @property
    def userfaultfd(self) -> int | None:
        """None: nobody runs on the RAM, or see `no_userfaultfd`."""

    @property
    def pagemap(self) -> int | None:
        """Of the guest's process; None: writes cannot be tracked."""

    no_userfaultfd: str | None
    """Why an attached guest came without a userfaultfd, and the fix."""

    outlives_host: bool
    """Whether it is on a disk, and what is kept of it, too, and nothing of other
    guests: then a restart of the host is not its end.
    """

    @property
    def kept(self) -> Mapping[str, int]:
        """Files that a daemon before this one had kept, by name."""

    @property
    def is_gone(self) -> bool:
        """Whether the guest's process is gone."""

    async def wait_gone(self) -> NoReturn:
        """Raise GuestError once the guest's process is gone; without one wait."""

    async def stop(self) -> None: ...

    async def cont(self) -> None: ...

    async def save(self) -> bytes: ...

    async def load(self, device: Device, state: bytes) -> None: ...

    def make_kept(self, name: str, length: int) -> int:
        """A file of zeroes that can be kept; HostError. The caller closes it."""

    async def keep(self, name: str, fd: int) -> None:
        """Hold the file over the daemon's death, in the place of one so named."""

    async def forget(self, name: str) -> None:
        """Hold it no more; fine if it is not held."""

    async def quit(self) -> None: ...

    def close(self) -> None: ...
