"""Needs of tests, private folders, huge pages, processes left behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import hugepages, needs, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# A guest's process gives its memory back after its daemon has ended.
ENDING_SECONDS = 5.0


def pytest_configure() -> None:
    processes.adopt_orphans()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        lack = needs.missing(marker.name)
        if lack is None:
            continue
        if os.environ.get("CI") == "true" and needs.provided_by_setup(marker.name):
            pytest.fail(f"{marker.name}: {lack}")
        pytest.skip(f"{marker.name}: {lack}")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fail a test that leaves a process behind, and end that process."""
    before = processes.children()
    yield
    left = {
        pid: name
        for pid, name in processes.children().items()
        if pid not in before and not processes.wait_end(pid, ENDING_SECONDS)
    }
    for pid in left:
        processes.end(pid)
    assert not left, f"the test left processes running: {left}"


@pytest.fixture
def private_dir() -> Iterator[Path]:
    """A folder of this test alone, with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def reserve_hugepages() -> Iterator[Callable[[int], None]]:
    """Call it with the number of 2 MiB pages the test needs."""
    with contextlib.ExitStack() as stack:

        def reserve(pages: int) -> None:
            try:
                stack.enter_context(hugepages.reserved(pages))
            except MemoryError as error:
                if os.environ.get("CI") == "true":
                    pytest.fail(f"hugepages: {error}")
                pytest.skip(f"hugepages: {error}")

        yield reserve
