"""A guest's memory file, looked at and filled from outside."""

from __future__ import annotations

import os

from memory import GuestMemory

PAGE = 4096
SIZE = 64 * PAGE


def test_zeroes_take_memory_and_harm_no_data() -> None:
    fd = os.memfd_create("guest-ram")
    try:
        os.ftruncate(fd, SIZE)
        for page in (0, 7, 8, 40):
            os.pwrite(fd, b"data", page * PAGE)
        with GuestMemory.of_process(os.getpid()) as memory:
            assert memory.allocated() == 4 * PAGE
            memory.fill_zeroes()
            assert memory.allocated() == SIZE
        assert os.lseek(fd, 0, os.SEEK_HOLE) == SIZE
        pages = [os.pread(fd, PAGE, start) for start in range(0, SIZE, PAGE)]
        assert [n for n, page in enumerate(pages) if any(page)] == [0, 7, 8, 40]
    finally:
        os.close(fd)
