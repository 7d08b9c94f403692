"""The directory itself: open, locked, and its RAM files.

Locks are flock(2)s, gone with their process: who fills a directory has it
exclusively, who serves it shares it, and who serves it not as a clone has its
configuration exclusively besides: a file that is there from the start.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from common.errors import HostError
from common.store import files

if TYPE_CHECKING:
    from pathlib import Path

    from common.store.manifest import Block


class Directory:
    """An open directory and the lock on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.named(path, "open"):
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def fd(self) -> int:
        return self._fd

    def lock(self, how: int, refusal: str) -> None:
        flock(self._fd, how, self.path, refusal)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def flock(fd: int, how: int, path: Path, refusal: str) -> None:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HostError(f"{path} {refusal}") from None
    except OSError as error:
        files.refuse(path, "lock", error)


def open_block(directory: Path, block: Block, mode: int) -> int:
    path = directory / block.file
    with files.named(path, "open"):
        fd = os.open(path, mode | os.O_CLOEXEC)
    size = os.fstat(fd).st_size
    if size < block.offset + block.length:
        os.close(fd)
        raise HostError(
            f"{path} is cut off: RAM block {block.name} needs"
            f" {block.offset + block.length} bytes and there are {size}"
        )
    return fd
