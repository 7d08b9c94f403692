"""The machine's pool of 2 MiB huge pages, grown for a test and shrunk after."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def missing() -> str | None:
    """Say why no huge pages can be had, or None."""
    if not _POOL.exists():
        return "the kernel has no 2 MiB huge pages"
    if not os.access(_POOL, os.W_OK):
        return f"{_POOL} can't be written: that takes root"
    return None


@contextlib.contextmanager
def reserved(pages: int) -> Iterator[None]:
    """Have this many huge pages more than before; MemoryError if there aren't."""
    got = _grow(pages)
    try:
        if got < pages:
            raise MemoryError(f"the kernel found {got} of {pages} huge pages")
        yield
    finally:
        _grow(-got)


def _grow(pages: int) -> int:
    """Change the size of the pool; returns by how much it changed."""
    with _alone():
        before = int(_POOL.read_text())
        _POOL.write_text(str(max(before + pages, 0)))
        return int(_POOL.read_text()) - before


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    # Other checks may run on this machine: reading and writing is one step.
    path = Path(tempfile.gettempdir()) / "postcopyd-hugepages.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
