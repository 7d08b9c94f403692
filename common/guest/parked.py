"""A guest without CPUs: RAM blocks in files, named on the command line.

Nobody runs on it, so nothing writes to it and no fault has to be answered. It
faces `qemu -M none`, and it is what parking stands on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from common.errors import GuestError, HostError
from common.guest.base import Device, GuestState, RamBlock, file_page_size
from common.guest.keeping import memory_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SUFFIXES: Final = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes from `4096`, `512M`, `1G`; ValueError for anything else."""
    found = re.fullmatch(r"([0-9]{1,15})([BKMGT]?)", text.upper())
    if not found:
        raise ValueError(f"not a size: {text!r} (bytes, or with K, M, G or T)")
    return int(found[1]) << _SUFFIXES[found[2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RamFile:
    """`NAME=FILE[,size=SIZE]`: a RAM block and the file behind it.

    Without a size the block is as long as the file. A file that is not there or
    shorter is made that long.
    """

    idstr: str
    path: str
    size: int | None

    @classmethod
    def parse(cls, text: str) -> RamFile:
        name, equals, rest = text.partition("=")
        path, _, option = rest.partition(",size=")
        if not name or not equals or not path or len(name.encode()) > 255:
            raise ValueError(f"not NAME=FILE[,size=SIZE]: {text!r}")
        return cls(idstr=name, path=path, size=parse_size(option) if option else None)


class ParkedGuest:
    """RAM and a run state; stopping and continuing change only the latter."""

    device: Device | None = None
    userfaultfd: int | None = None
    pagemap: int | None = None
    no_userfaultfd: str | None = None
    vcpus: Sequence[int] = ()
    abilities = 0
    kept: Mapping[str, int] = MappingProxyType({})
    is_gone = False
    outlives_host = False

    def __init__(
        self, machine: str, files: Sequence[RamFile], state: GuestState
    ) -> None:
        self.machine = machine
        self.state = state
        self.blocks: Sequence[RamBlock] = tuple(_open_block(file) for file in files)

    async def wait_gone(self) -> NoReturn:
        while True:
            await trio.sleep_forever()

    async def stop(self) -> None:
        self.state = GuestState.PAUSED

    async def cont(self) -> None:
        self.state = GuestState.RUNNING

    async def save(self) -> bytes:
        return b""

    async def load(self, device: Device, state: bytes) -> None:
        self.state = GuestState.PAUSED

    def make_kept(self, name: str, length: int) -> int:
        return memory_file(name, length)

    async def keep(self, name: str, fd: int) -> None:
        raise GuestError("there is none", request="keep")

    async def forget(self, name: str) -> None:
        pass

    async def quit(self) -> None:
        self.close()

    def close(self) -> None:
        for block in self.blocks:
            os.close(block.fd)
        self.blocks = ()


def _open_block(file: RamFile) -> RamBlock:
    try:
        fd = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"RAM block {file.idstr}: cannot open {file.path}: {error.strerror}",
            errno=error.errno,
        ) from None
    try:
        page_size = file_page_size(fd)
        length = file.size if file.size is not None else os.fstat(fd).st_size
        if length == 0 or length % page_size:
            raise HostError(
                f"RAM block {file.idstr}: {length} bytes is not a multiple of its"
                f" page size {page_size}; give size="
            )
        if os.fstat(fd).st_size < length:
            os.ftruncate(fd, length)
    except BaseException:
        os.close(fd)
        raise
    return RamBlock(
        idstr=file.idstr,
        length=length,
        page_size=page_size,
        base=0,
        guest_address=0,
        fd=fd,
    )
