"""Daemons end in the middle of postcopy, and systemd or an operator starts them.

The guest's process outlives them, and so does what has arrived of its memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts.services import LISTEN, moving

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts.bed import Bed
    from hosts.services import Move, Unit


def killed(*sides: Unit) -> None:
    """All at once, and systemd starts them again."""
    for side in sides:
        side.kill()
    for side in sides:
        side.host.wait(side.unit, "NRestarts", "1")


def restarted(side: Unit) -> None:
    side.host.systemctl("restart", side.unit)


def stopped(side: Unit) -> None:
    side.host.systemctl("stop", side.unit)
    assert side.host.show(side.unit, "ActiveState") == "inactive"
    side.host.systemctl("start", side.unit)


BLOWS: dict[str, Callable[[Move], None]] = {
    "source-killed": lambda move: killed(move.src),
    "destination-killed": lambda move: killed(move.dst),
    "both-killed": lambda move: killed(move.src, move.dst),
    "source-restarted": lambda move: restarted(move.src),
    "destination-restarted": lambda move: restarted(move.dst),
    "source-stopped": lambda move: stopped(move.src),
    "destination-stopped": lambda move: stopped(move.dst),
}
TAKEN_UP = "taking up what the daemon before this one has left"
KILLED = [blow for blow in BLOWS if blow.endswith("-killed")]
AUTO = ("[recovery]", "auto = true", "first-delay = 0", "greatest-delay = 1")


def others(move: Move, before: list[int]) -> bool:
    """Whether it is another process at one end at least."""
    return [side.pid for side in move.sides] != before


@pytest.mark.parametrize("blow", BLOWS)
def test_recovers_by_hand(bed: Bed, name: str, blow: str) -> None:
    with moving(bed, name) as move:
        move.to_postcopy()
        daemons = [side.pid for side in move.sides]
        guests = [side.host.show(side.guest, "MainPID") for side in move.sides]
        owed = move.remaining
        BLOWS[blow](move)
        move.reconnect()
        assert others(move, daemons)
        move.wait_paused()
        # What has come has come: it does not begin at the beginning.
        assert move.remaining <= owed
        move.recover()
        move.wait_pages(50)
        move.complete()
        assert guests == [side.host.show(side.guest, "MainPID") for side in move.sides]


@pytest.mark.parametrize("blow", [*KILLED, "destination-restarted"])
def test_recovers_by_itself(bed: Bed, name: str, blow: str) -> None:
    """With [recovery] auto, after whatever has happened to the daemons."""
    with moving(bed, name, *AUTO) as move:
        move.to_postcopy()
        daemons = [side.pid for side in move.sides]
        BLOWS[blow](move)
        move.reconnect()
        assert others(move, daemons)
        move.complete()
        assert any(TAKEN_UP in side.said for side in move.sides)


@pytest.mark.parametrize("blow", [*KILLED, "network"])
def test_precopy_begins_again(bed: Bed, name: str, blow: str) -> None:
    """The guest runs on at the source; the destination waits for it once more."""
    with moving(bed, name, incoming=LISTEN) as move:
        move.to_precopy()
        if blow == "network":
            bed.link.drop()
            move.src.wait_status("failed")
            bed.link.repair()
        else:
            BLOWS[blow](move)
        move.dst.host.wait(move.dst.unit, "StatusText", "setup: waiting at")
        move.reconnect()
        assert move.src.execute("query-status")["running"]
        move.src.set_parameters(max_bandwidth=0)
        move.src.migrate(move.there)
        move.wait_completed()


def test_the_network_comes_back(bed: Bed, name: str) -> None:
    """With [recovery] auto the network is all that somebody has to mend."""
    with moving(bed, name, *AUTO) as move:
        move.to_postcopy()
        bed.link.drop()
        move.wait_paused()
        bed.link.repair()
        move.complete()
        assert move.src.ours["recovery"]["recovered"] == 1


def test_a_crash_loop_is_no_end(bed: Bed, name: str) -> None:
    """However often a daemon ends: a guest waits for its pages."""
    with moving(bed, name, *AUTO) as move:
        move.to_postcopy()
        for times in range(1, 7):
            move.dst.kill()
            move.dst.host.wait(move.dst.unit, "NRestarts", str(times))
        move.dst.host.wait(move.dst.unit, "ActiveState", "active")
        move.reconnect()
        move.complete()


def test_a_wrong_file_is_the_end(bed: Bed, name: str) -> None:
    """Also for a client that waits: its daemon is not started for ever."""
    with moving(bed, name) as move:
        src = move.src
        src.qmp.close()
        src.host.systemctl("stop", src.unit)
        file = src.host.path(f"/etc/postcopyd/{name}.toml")
        right = file.read_text()
        file.write_text('memmory = "1G"\n')
        with pytest.raises(OSError, match=r"reset|refused|timed out"):
            src.connect()
        src.host.wait(src.socket, "ActiveState", "failed")
        assert src.host.show(src.unit, "ExecMainStatus") == "2"
        assert "did you mean 'memory'" in src.said
        file.write_text(right)
        src.host.systemctl("reset-failed", src.unit, src.socket)
        src.host.systemctl("start", src.socket)
        src.connect()
        assert src.execute("query-status")["running"]
