"""A daemon is killed at any moment, and started again: nothing is lost.

The guest's process outlives it, and the daemon after it comes up paused.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import (
    POSTCOPY,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    move_precopy,
    prepare,
)
from support.ram import MIB, Block, SharedRam
from support.recovery import GUEST, LITTLE, SLOW, both_ways, in_postcopy

if TYPE_CHECKING:
    from pathlib import Path

    from support.recovery import Ends

pytestmark = [pytest.mark.userfaultfd]


def kill(ends: Ends, *sides: str) -> None:
    """Kill these daemons, start them again, and both are paused."""
    chosen = [getattr(ends, side) for side in sides]
    for daemon in chosen:
        daemon.end()
    for daemon in chosen:
        daemon.start()
    for daemon in (ends.src, ends.dst):
        if daemon in chosen:
            assert daemon.query()["status"] == "postcopy-paused", daemon.said
        else:
            daemon.wait_status("postcopy-paused")


@pytest.mark.parametrize("sides", [("dst",), ("src",), ("src", "dst")], ids="-".join)
@both_ways
def test_killed(
    tmp_path: Path, capabilities: tuple[str, ...], sides: tuple[str, ...]
) -> None:
    with in_postcopy(tmp_path, capabilities) as ends:
        here = ends.dst.ours["postcopy-pages"]
        kill(ends, *sides)
        assert ends.dst.execute("query-status")["running"]
        ends.recover()
        ends.wait_both("postcopy-active")
        ends.wait_pages(100)
        ends.complete()
        assert here >= 100


@pytest.mark.parametrize("side", ["src", "dst"])
def test_ended_by_the_service_manager(tmp_path: Path, side: str) -> None:
    """A signal in the middle of postcopy ends the daemon, not the guest."""
    with in_postcopy(tmp_path, POSTCOPY) as ends:
        daemon = getattr(ends, side)
        daemon.end(signal.SIGTERM)
        assert "ended in the middle of postcopy" in daemon.said
        daemon.start()
        assert daemon.query()["status"] == "postcopy-paused"
        ends.recover()
        ends.wait_both("postcopy-active")
        ends.complete()


@pytest.mark.parametrize(
    ("managed", "way_on"),
    [
        (True, "after `restart` recover, after `stop` the guest is lost"),
        (False, "nobody keeps what the next daemon needs; the guest is lost"),
    ],
    ids=["service", "alone"],
)
def test_ended_when_no_process_keeps_anything(
    private_dir: Path, monkeypatch: pytest.MonkeyPatch, managed: bool, way_on: str
) -> None:
    """The log says what the operator may still do."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with ExitStack() as stack:
        if managed:
            manager = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            )
            manager.bind(str(private_dir / "manager"))
            monkeypatch.setenv("NOTIFY_SOCKET", str(private_dir / "manager"))
        files = [SharedRam(Block("ram", 4 * MIB)) for _ in range(2)]
        words = [f"ram=/proc/{os.getpid()}/fd/{file.fd}" for file in files]
        for file in files:
            stack.callback(file.close)
        files[0].fill(seed=1)
        src = stack.enter_context(Source(private_dir, "--ram", words[0]))
        dst = stack.enter_context(Destination(private_dir, "--ram", words[1]))
        prepare(src, dst, *POSTCOPY)
        src.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
        src.migrate(dst.listen())
        src.wait_status("active")
        src.execute("migrate-start-postcopy")
        for side in (src, dst):
            side.wait_status("postcopy-active")
        for side in (dst, src):
            side.end(signal.SIGTERM)
            (said,) = re.findall("ended in the middle of postcopy: (.*)", side.said)
            assert said.endswith(way_on)


def test_quit_ends_the_guest_even_then(tmp_path: Path) -> None:
    with in_postcopy(tmp_path, POSTCOPY) as ends:
        ends.dst.execute("quit")
        ends.dst.process.wait(30)
        ends.dst.qmp.close()
        ends.dst.start()
        assert ends.dst.query() == {}
        assert ends.dst.execute("query-status")["status"] == "inmigrate"


def test_settings_hold(tmp_path: Path) -> None:
    with in_postcopy(tmp_path, POSTCOPY) as ends:
        for daemon in (ends.src, ends.dst):
            daemon.set_parameters(max_postcopy_bandwidth=SLOW // 2)
            daemon.end()
            daemon.start()
            parameters = daemon.execute("query-migrate-parameters")
            assert parameters["max-postcopy-bandwidth"] == SLOW // 2
            on = daemon.execute("query-migrate-capabilities")
            assert {"capability": "postcopy-ram", "state": True} in on


def in_precopy(src: Source, dst: Destination) -> None:
    """Under way for as long as it takes."""
    prepare(src, dst)
    src.set_parameters(max_bandwidth=SLOW)
    src.migrate(dst.listen())
    src.wait_status("active")


def test_destination_killed_in_precopy(tmp_path: Path) -> None:
    """The guest runs on at the source, and can be migrated to the same guest."""
    with Source(tmp_path, *GUEST) as src, Destination(tmp_path, *LITTLE) as dst:
        before = src.wait_filled()
        in_precopy(src, dst)
        dst.end()
        assert src.wait_status("failed", "completed") == "failed"
        src.wait_report(lambda r: r.counter > before.counter)
        dst.start()
        assert dst.query() == {}
        prepare(src, dst, *POSTCOPY)
        src.set_parameters(max_bandwidth=0)
        move_postcopy(src, dst)
        assert_unharmed(dst, before)


def test_source_killed_in_precopy(tmp_path: Path) -> None:
    """The guest runs on where it is, and no migration is known any more."""
    with Source(tmp_path, *GUEST) as src, Destination(tmp_path, *LITTLE) as dst:
        before = src.wait_filled()
        in_precopy(src, dst)
        src.end()
        assert dst.wait_status("failed") == "failed"
        src.start()
        assert src.query() == {}
        assert src.execute("query-status")["running"]
        src.wait_report(lambda r: r.counter > before.counter)
    with Source(tmp_path, *GUEST) as src, Destination(tmp_path, *LITTLE) as dst:
        before = src.wait_filled()
        src.end()
        src.start()
        prepare(src, dst)
        src.set_parameters(max_bandwidth=0)
        move_precopy(src, dst)
        assert_unharmed(dst, before)


def test_source_killed_when_the_guest_is_stopped(tmp_path: Path) -> None:
    """The guest is the source's still: it goes on."""
    with Source(tmp_path, *GUEST) as src, Destination(tmp_path, *LITTLE) as dst:
        before = src.wait_filled()
        prepare(src, dst, "pause-before-switchover")
        src.set_parameters(max_bandwidth=0)
        src.migrate(dst.listen())
        src.wait_status("pre-switchover")
        src.end()
        src.start()
        assert src.execute("query-status")["running"]
        assert "ended when the guest was stopped" in src.said
        assert assert_unharmed_at(src, before)


def assert_unharmed_at(daemon: Any, before: Any) -> Any:
    return daemon.wait_report(
        lambda r: r.counter > before.counter and r.checked > before.checked
    )


def test_restarted_when_all_is_over(tmp_path: Path) -> None:
    with Source(tmp_path, *GUEST) as src, Destination(tmp_path, *LITTLE) as dst:
        before = src.wait_filled()
        prepare(src, dst, *POSTCOPY)
        src.set_parameters(max_bandwidth=0)
        move_postcopy(src, dst)
        for daemon in (src, dst):
            daemon.end()
            daemon.start()
            assert daemon.query()["status"] == "completed", daemon.said
        assert src.execute("query-status")["status"] == "postmigrate"
        assert dst.execute("query-status")["running"]
        assert_unharmed(dst, before)


def test_the_limit_holds(tmp_path: Path) -> None:
    """The next source sends no faster than the one before was told to."""
    with in_postcopy(tmp_path, POSTCOPY) as ends:
        kill(ends, "src")
        ends.recover()
        ends.wait_both("postcopy-active")
        # Without it everything has come before the guest asks for so much.
        while ends.src.ours["urgent-pages"] < 500:
            assert ends.src.query()["status"] == "postcopy-active"
        ends.complete()
