"""No Python runs per page: its calls do not grow with the guest's RAM."""

from __future__ import annotations

import sys
import threading

import pytest
from support.inprocess import pair

MIB = 1 << 20
SMALL, LARGE = 8 * MIB, 256 * MIB
# Threads take turns differently in every run; pages would show as a factor of 32.
TOLERANCE = 1.5


@pytest.mark.parametrize(
    "capabilities", [(), ("postcopy-ram",), ("postcopy-ram", "postcopy-preempt")]
)
async def test_python_calls_do_not_grow_with_ram(capabilities: tuple[str, ...]) -> None:
    small = await count_calls(SMALL, *capabilities)
    large = await count_calls(LARGE, *capabilities)
    assert small > 0
    assert large < small * TOLERANCE, f"{small} calls for 8 MiB, {large} for 256 MiB"


async def count_calls(size: int, *capabilities: str) -> int:
    """Move `size` bytes; how many Python functions were called for it."""
    with pair(size, *capabilities) as both:
        if capabilities:
            both.outgoing.start_postcopy()
        with Calls() as calls:
            await both.move()
        stats = both.outgoing.pump.stats
        assert stats.normal_pages + stats.zero_pages == size // 4096
        assert bool(capabilities) == (stats.background_pages > 0)
    return calls.count


class Calls:
    """Counts the calls of Python functions in this thread and in new ones."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _seen(self, frame: object, event: str, arg: object) -> None:
        if event == "call":
            self.count += 1
