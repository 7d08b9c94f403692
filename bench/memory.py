"""A guest's RAM, looked at from outside: how much it holds, what it reports.

Reading by `pread` leaves holes as they are; a mapping would fill them.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from support.report import REPORT_ADDRESS, REPORT_SIZE, Report, ReportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

SECTOR: Final = 512  # unit of st_blocks, whatever the file system's is
WRITE_BYTES: Final = 1 << 20
SAMPLE_SECONDS: Final = 0.02
FILL_SECONDS: Final = 300.0


class GuestMemory:
    """The memory behind a descriptor; a duplicate of it is kept."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    @classmethod
    def of_process(cls, pid: int, name: str = "guest-ram") -> GuestMemory:
        """The memfd of this name that a process holds; LookupError without one."""
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link).startswith(f"/memfd:{name}"):
                with link.open("r+b", buffering=0) as file:
                    return cls(file.fileno())
        raise LookupError(f"process {pid} holds no memfd {name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def allocated(self) -> int:
        """Bytes that hold memory."""
        return os.fstat(self._fd).st_blocks * SECTOR

    def report(self) -> Report:
        """The test guest's own account."""
        return Report.parse(os.pread(self._fd, REPORT_SIZE, REPORT_ADDRESS))

    def fill_zeroes(self) -> None:
        """Write zeroes to every page that has no memory yet.

        `posix_fallocate` would leave what lseek still calls a hole. The guest
        runs, but does not touch what it has left alone until now.
        """
        zeroes = bytes(WRITE_BYTES)
        size = os.fstat(self._fd).st_size
        start = os.lseek(self._fd, 0, os.SEEK_HOLE)
        while start < size:
            try:
                end = os.lseek(self._fd, start, os.SEEK_DATA)
            except OSError:  # no data behind it
                end = size
            for offset in range(start, end, WRITE_BYTES):
                os.pwrite(self._fd, zeroes[: end - offset], offset)
            start = os.lseek(self._fd, end, os.SEEK_HOLE) if end < size else size

    def wait_filled(self, seconds: float = FILL_SECONDS) -> None:
        """Until the guest has filled its area and begun to work."""
        deadline = time.monotonic() + seconds
        while not self._filled():
            if time.monotonic() > deadline:
                raise TimeoutError("the guest does not fill its memory")
            time.sleep(0.02)  # nobody says when

    def _filled(self) -> bool:
        with suppress(ReportError):
            return self.report().filled
        return False


class Sampler:
    """Looks every 20 ms at how much has been moved, in a thread of its own.

    `moved` gives bytes; `timeline` is (seconds since the start, bytes more than at
    the start). Looks only if the case is `watched`.
    """

    def __init__(self, moved: Callable[[], int], *, watched: bool) -> None:
        self.timeline: list[tuple[float, int]] = []
        self._moved = moved
        self._watched = watched
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        if self._watched:
            self._first = self._moved()
            self._begun = time.monotonic()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watched:
            self._over.set()
            self._thread.join()
            self._look()

    def _sample(self) -> None:
        self._look()
        while not self._over.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        seconds = time.monotonic() - self._begun
        grown = self._moved() - self._first
        self.timeline.append((round(seconds, 4), grown))
