"""Small files of a parked VM: written so that a crash leaves the old or the new.

Every OSError becomes a HostError that names the file.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NoReturn

from common.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MODE: Final = 0o600
_PIECE: Final = 64 << 10  # bytes that are read and written at once
_HINTS: Final = {
    errno.ENOSPC: "; make room on that file system",
    errno.EDQUOT: "; raise the quota or make room",
    errno.EACCES: "; run as the owner of the directory",
    errno.EPERM: "; run as the owner of the directory",
    errno.EROFS: "; it is mounted read-only",
}


def refuse(path: Path, doing: str, error: OSError) -> NoReturn:
    """Raise the HostError for an OSError that `doing` something to `path` met."""
    hint = _HINTS.get(error.errno or 0, "")
    raise HostError(
        f"cannot {doing} {path}: {error.strerror or error}{hint}", errno=error.errno
    ) from None


@contextmanager
def named(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        refuse(path, doing, error)


def write(path: Path, content: bytes, *, durable: bool = False) -> None:
    """A file with this content; `durable`: on the disk, but perhaps not its name."""
    with named(path, "write"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(fd, left) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)


def replace(path: Path, content: bytes) -> None:
    """Durably and at once: who reads finds what was before, or all of this."""
    temporary = path.with_name(path.name + ".new")
    try:
        write(temporary, content, durable=True)
        with named(path, "write"):
            os.rename(temporary, path)
    except HostError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def read(path: Path, limit: int) -> bytes:
    """The whole file; HostError if it is longer than `limit` bytes."""
    with named(path, "read"), open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise HostError(f"{path} is longer than it can be: over {limit} bytes")
    return content


def sync_open(fd: int, path: Path) -> None:
    """What was written to the file `path` since `fd` was opened is on the disk."""
    with named(path, "write"):
        os.fsync(fd)


def write_again(fd: int, path: Path) -> None:
    """Have the kernel write all data of a file, even what it takes for written."""
    with named(path, "write"):
        end = os.fstat(fd).st_size
        at = _next_data(fd, 0)
        while at < end:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            piece = os.pread(fd, min(_PIECE, hole - at), at)
            at = _next_data(fd, at + os.pwrite(fd, piece, at))


def _next_data(fd: int, at: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return os.fstat(fd).st_size
        raise


def sync(path: Path) -> None:
    """What was written to this file is on the disk afterwards."""
    with named(path, "write"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_directory(path: Path) -> None:
    """The names in it are on the disk afterwards."""
    sync(path)


def create_sparse(path: Path, length: int) -> int:
    """A new file that is one hole; its descriptor, read and write."""
    return _create(path, length, os.ftruncate)


def create_solid(path: Path, length: int) -> int:
    """Likewise, of zeroes that have their room already.

    Writing to it cannot fail for want of room, nor kill who has it mapped.
    """
    return _create(path, length, _allocate)


def _allocate(fd: int, length: int) -> None:
    if length:
        os.posix_fallocate(fd, 0, length)


def _create(path: Path, length: int, make_long: Callable[[int, int], None]) -> int:
    with named(path, "create"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            make_long(fd, length)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
    return fd
