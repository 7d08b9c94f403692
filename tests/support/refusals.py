"""Migrations that must not succeed, and a source whose guest never notices.

    with source(folder) as src:
        with Destination(folder, "--memory", "24M") as dst:
            dst.set_capabilities()
            assert_refused(src, dst, "same --memory")
        assert_moves(src, folder, accel="process")

The directory is a test's own: its daemons have their sockets and logs there.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from support.daemons import (
    POSTCOPY,
    PROGRESS,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    move_precopy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.report import Report

SMALL = ("--memory", "32M")
# These guests have to go on unharmed, not to fill a processor meanwhile.
STEADY = ("--append", "write-rate=40M")
PRECOPY: tuple[str, ...] = ()
PATIENCE = 60.0  # seconds

precopy_and_postcopy = pytest.mark.parametrize(
    "capabilities",
    [pytest.param(PRECOPY, id="precopy"), pytest.param(POSTCOPY, id="postcopy")],
)


@contextmanager
def source(directory: Path, *words: str, accel: str = "process") -> Iterator[Source]:
    """A source whose guest has begun to write and check its memory."""
    words = (*(words or SMALL), *STEADY, "--accel", accel)
    with Source(directory, *words) as src:
        src.wait_filled()
        src.set_capabilities()
        yield src


def attempt(src: Source, uri: str) -> str:
    """A migration that must not succeed; returns the source's `error-desc`.

    The guest is not even stopped for a moment, and goes on.
    """
    before = src.report()
    src.qmp.events()
    src.migrate(uri)
    assert src.wait_status("failed", "completed") == "failed"
    assert "device" not in src.statuses
    assert "STOP" not in [event["event"] for event in src.qmp.events()]
    assert_runs_on(src, before)
    return src.query()["error-desc"]


def assert_runs_on(src: Source, before: Report) -> None:
    assert src.execute("query-status") == {"status": "running", "running": True}
    report = src.wait_report(lambda r: r.counter > before.counter + PROGRESS)
    assert report.wrong == 0, report


def assert_refused(src: Source, dst: Destination, *texts: str) -> None:
    """Both sides fail and say the same, which has all these texts in it."""
    theirs = attempt(src, dst.listen())
    assert dst.wait_status("failed", "completed") == "failed"
    ours = dst.query()["error-desc"]
    assert dst.execute("query-status") == {"status": "inmigrate", "running": False}
    # What the source says quotes the destination, up to its length limit.
    assert ours in theirs
    for text in texts:
        assert text in ours


def assert_moves(src: Source, directory: Path, *words: str, accel: str) -> None:
    """The guest that was refused is taken by a destination that fits it."""
    on = [c["capability"] for c in capabilities(src) if c["state"]]
    words = (*(words or SMALL), "--accel", accel)
    with Destination(directory, *words, name="fits") as dst:
        dst.set_capabilities(*on)
        before = src.report()
        (move_postcopy if "postcopy-ram" in on else move_precopy)(src, dst)
        assert_unharmed(dst, before)


def capabilities(src: Source) -> list[dict[str, Any]]:
    return src.execute("query-migrate-capabilities")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
