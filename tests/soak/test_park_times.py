"""A guest that is restored lazily runs soon, whatever the link.

Times are compared with each other only, of the same state on the same machine:
what is in front of a first line is the whole RAM on the one side, and a few
hundred pages on the other.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.restoring import FULL, LAZY, PREEMPT, QEMU, State, Until, Way, restore

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.soak,
    pytest.mark.qemu,
    pytest.mark.linux,
    pytest.mark.userfaultfd,
]

MIB = 1 << 20
RATE = 50_000_000  # bytes per second; the whole guest takes 4 s
LINK_RATE = 12_500_000
# A busy machine makes the lazy one slower, and what the link bounds not faster.
SOONER = 4


@pytest.fixture(scope="module")
def state() -> Iterator[State]:
    directory = Path(tempfile.mkdtemp(prefix="park-times-", dir="/dev/shm"))
    try:
        yield State.make(directory, 256 * MIB)
    finally:
        shutil.rmtree(directory)


@contextmanager
def deep_link(address: str) -> Iterator[str]:
    """12.5 MB/s with deep buffers, as the benchmark has it."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
    from relay import LINKS

    with LINKS["deep"].to(address) as relayed:
        yield relayed


@pytest.mark.parametrize("lazily", [LAZY, PREEMPT], ids=lambda way: way.name)
@pytest.mark.parametrize("wholly", [QEMU, FULL], ids=lambda way: way.name)
def test_sooner_than_the_whole(state: State, wholly: Way, lazily: Way) -> None:
    whole = restore(state, wholly, rate=RATE)
    lazy = restore(state, lazily, rate=RATE, until=Until.CHECKED)
    assert lazy.requested, "it had to wait for no page"
    assert lazy.first_line * SOONER < whole.first_line, (lazy, whole)


@pytest.mark.parametrize("lazily", [LAZY, PREEMPT], ids=lambda way: way.name)
def test_behind_deep_buffers(state: State, lazily: Way) -> None:
    """What nobody has asked for does not fill the link in front of what is asked."""
    whole = state.stream.stat().st_size / LINK_RATE  # it cannot be sooner
    lazy = restore(state, lazily, between=deep_link)
    assert lazy.first_line * SOONER < whole, (lazy, whole)
