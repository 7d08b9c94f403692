"""A paused postcopy goes on without being asked, and only if that is wanted."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import POSTCOPY
from support.recovery import Ends, both_ways, in_postcopy
from support.relay import Trap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.userfaultfd]

CUTS = 3
EVENT = "X_POSTCOPYD_RECOVERY"
PAUSED = "postcopy-paused"

# Before a peer that says nothing is given up.
SHORT = ("--peer-timeout", "1")


def policy(**values: Any) -> dict[str, Any]:
    """Parameters of automatic recovery."""
    return {f"x-postcopyd-recovery-{k.replace('_', '-')}": v for k, v in values.items()}


def switch_on(ends: Ends, **values: Any) -> None:
    for side in (ends.src, ends.dst):
        side.set_parameters(**policy(auto=True, **values))


@contextlib.contextmanager
def recovering(
    directory: Path, capabilities: tuple[str, ...] = POSTCOPY, **values: Any
) -> Iterator[Ends]:
    """In postcopy, and automatic recovery is on."""
    with in_postcopy(directory, capabilities, *SHORT) as ends:
        switch_on(ends, **values)
        yield ends


def cut(ends: Ends) -> None:
    """Everything that is connected now, or was."""
    ends.relay.wait_links(ends.channels)
    links, ends.relay.links = ends.relay.links, []
    for link in links:
        link.reset()


def wait_result(ends: Ends, wanted: str, **more: Any) -> dict[str, Any]:
    """The next event of that kind."""
    event = ends.src.qmp.wait_event(EVENT, 60, result=wanted, **more)
    data: Any = event["data"]
    return dict(data)


def recovery(ends: Ends) -> dict[str, Any]:
    found: dict[str, Any] = ends.src.ours["recovery"]
    return found


@contextlib.contextmanager
def dead_end(ends: Ends) -> Iterator[Trap]:
    """Meanwhile the network leads to somebody who hangs up."""
    back = ends.dst.query()["socket-address"][0]
    with Trap(hang_up=True) as trap:
        ends.relay.to(trap.uri)
        yield trap
        ends.relay.to(f"tcp:{back['host']}:{back['port']}")


@both_ways
def test_it_comes_back_by_itself(
    private_dir: Path, capabilities: tuple[str, ...]
) -> None:
    with recovering(private_dir, capabilities, first_delay=0) as ends:
        for number in range(1, CUTS + 1):
            ends.wait_pages(20)
            cut(ends)
            ends.assert_paused()
            assert wait_result(ends, "planned", attempt=1)["delay"] == 0
            wait_result(ends, "recovered")
            ends.wait_both("postcopy-active")
            assert recovery(ends)["recovered"] == number
        assert recovery(ends)["state"] == "ready"
        assert recovery(ends)["attempts"] >= CUTS
        ends.complete()
        assert ends.src.statuses.count(PAUSED) >= CUTS
        assert "error-desc" not in ends.src.query()


def test_a_link_that_comes_back_late(private_dir: Path) -> None:
    """The waits double, up to the greatest."""
    with recovering(private_dir, greatest_delay=2) as ends:
        with dead_end(ends) as trap:
            cut(ends)
            delays = []
            for attempt in (1, 2, 3):
                planned = wait_result(ends, "planned")
                assert planned["attempt"] == attempt
                delays.append(planned["delay"])
                assert wait_result(ends, "failed")["attempt"] == attempt
            assert delays == [1, 2, 2]
            assert trap.taken == 3
        wait_result(ends, "recovered")
        ends.wait_pages(1)
        assert recovery(ends)["attempts"] >= 4
        ends.src.statuses.clear()
        ends.complete()


def test_the_limit_is_reached(private_dir: Path) -> None:
    """Paused it stays, it says why, and an order goes on all the same."""
    with recovering(private_dir, first_delay=0, greatest_delay=1, attempts=2) as ends:
        with dead_end(ends) as trap:
            cut(ends)
            told = wait_result(ends, "given-up")
            assert told["attempt"] == 2
            info = ends.src.query()
            assert info["status"] == PAUSED
            assert info["error-desc"] == told["error-desc"]
            assert "given up: 2 attempts in a row" in info["error-desc"]
            assert recovery(ends)["state"] == "given-up"
            assert trap.taken == 2
        ends.recover()
        ends.src.wait_status("postcopy-active")
        assert recovery(ends)["recovered"] == 0
        # The count begins anew; the first may come before the destination has
        # noticed anything.
        ends.wait_pages(1)
        cut(ends)
        assert wait_result(ends, "recovered")["attempt"] <= 2
        ends.src.statuses.clear()
        ends.complete()


def test_what_the_operator_paused_is_his(private_dir: Path) -> None:
    with recovering(private_dir, first_delay=0) as ends:
        ends.src.execute("migrate-pause")
        ends.assert_paused()
        assert recovery(ends) == {
            **recovery(ends),
            "state": "held",
            "attempts": 0,
            "recovered": 0,
        }
        ends.recover()
        ends.wait_both("postcopy-active")
        ends.wait_pages(1)
        assert EVENT not in [event["event"] for event in ends.src.qmp.events()]
        # From here on it is not his any more.
        cut(ends)
        wait_result(ends, "recovered")
        ends.src.statuses.clear()
        ends.complete()


@pytest.mark.parametrize("how", ["network", "operator"])
def test_switched_on_while_it_is_paused(private_dir: Path, how: str) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        if how == "network":
            cut(ends)
        else:
            ends.src.execute("migrate-pause")
        ends.assert_paused()
        assert recovery(ends)["state"] == "off"
        assert EVENT not in [event["event"] for event in ends.src.qmp.events()]
        switch_on(ends, first_delay=0)
        wait_result(ends, "recovered")
        ends.complete()


def test_an_order_takes_the_place_of_an_attempt(private_dir: Path) -> None:
    """One that hangs: the network takes the connection, and nobody answers."""
    with (
        in_postcopy(private_dir, POSTCOPY, "--peer-timeout", "60") as ends,
        Trap() as trap,
    ):
        (back,) = ends.dst.query()["socket-address"]
        switch_on(ends, first_delay=0)
        ends.relay.to(trap.uri)
        cut(ends)
        ends.src.wait_status("postcopy-recover")
        assert recovery(ends)["state"] == "trying"
        begun = time.monotonic()
        uri = f"tcp:{back['host']}:{back['port']}"
        ends.src.execute("migrate", uri=uri, resume=True)
        ends.src.wait_status("postcopy-active")
        assert time.monotonic() - begun < 20
        assert "another order" in wait_result(ends, "failed")["error-desc"]
        assert recovery(ends)["address"] == uri.removeprefix("tcp:")
        ends.complete()


@pytest.mark.parametrize("sides", [("dst",), ("src",), ("src", "dst")], ids="-".join)
def test_a_daemon_that_was_killed(private_dir: Path, sides: tuple[str, ...]) -> None:
    """The next one knows what was switched on, and where the other end is."""
    with recovering(private_dir, first_delay=0, greatest_delay=1) as ends:
        daemons = [getattr(ends, side) for side in sides]
        for daemon in daemons:
            daemon.end()
        for daemon in daemons:
            daemon.start()
        wait_recovered(ends)
        assert all("taking up what" in daemon.said for daemon in daemons)
        ends.src.statuses.clear()
        ends.dst.statuses.clear()
        ends.complete()


def wait_recovered(ends: Ends) -> None:
    """A new source may have done it before anybody listens to its events."""
    deadline = time.monotonic() + 60
    while not recovery(ends)["recovered"]:
        assert time.monotonic() < deadline, ends.src.query()


def test_a_lost_listener_is_opened_again(private_dir: Path) -> None:
    """Somebody has removed its socket's name."""
    path = private_dir / "again"
    with recovering(private_dir, first_delay=0, greatest_delay=1) as ends:
        ends.src.execute("migrate-pause")
        ends.assert_paused()
        ends.dst.execute("migrate-recover", uri=f"unix:{path}")
        path.unlink()
        ends.src.execute("migrate", uri=f"unix:{path}", resume=True)
        assert "No such file" in wait_result_or_error(ends)
        wait_result(ends, "recovered")
        assert path.exists()
        assert f"listening again at {path}" in ends.dst.said
        ends.src.statuses.clear()
        ends.complete()


def wait_result_or_error(ends: Ends) -> str:
    """Why the first attempt, the operator's, has failed."""
    ends.src.wait_status("postcopy-recover-setup")
    ends.src.wait_status(PAUSED)
    return str(ends.src.query().get("error-desc"))
