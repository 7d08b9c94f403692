"""Reading a file that somebody gave us, by position, so that errors have one."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import ChannelLost, HostError, StreamError
from common.store import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class FileReader:
    """A `read` for the decoders of common.stream; `offset` is where it stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.named(path, "open"):
            # Not to wait for the writer of a pipe, which is refused.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self.fd = os.open(path, flags)
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.fd)
            raise HostError(f"{path} is not a file")
        self.size = found.st_size
        self.offset = 0
        self._last = 0

    def close(self) -> None:
        os.close(self.fd)

    def __call__(self, size: int) -> bytes:
        self._last = self.offset
        piece = self.look(size)
        self.offset += len(piece)
        if len(piece) < size:
            raise ChannelLost("the end of the file")
        return piece

    def look(self, size: int) -> bytes:
        """The next bytes, or those that are left; they stay to be read."""
        with files.named(self.path, "read"):
            return os.pread(self.fd, size, self.offset)

    def seek(self, offset: int) -> None:
        self.offset = self._last = offset

    @contextmanager
    def located(self) -> Iterator[None]:
        """What is wrong is said as a HostError, with the file and the place in it."""
        try:
            yield
        except StreamError as error:
            at = self._last if error.offset is None else error.offset
            told = StreamError(error.message, at, error.expected, error.got)
            raise HostError(f"{self.path} cannot be imported: {told}") from None
        except ChannelLost:
            raise HostError(
                f"{self.path} is cut off: it ends after {self.size:#x} bytes, within"
                f" what begins at {self._last:#x}"
            ) from None
