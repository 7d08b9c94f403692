"""Two hosts with systemd: what is installed there, and how a guest moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts.services import LISTEN, moving
from support.daemons import POSTCOPY, PREEMPT, prepare

if TYPE_CHECKING:
    from hosts.bed import Bed

MIB = 1 << 20
UNITS = (
    *("srcd@vm.service", "dstd@vm.service", "postcopyd-guest@vm.service"),
    *("srcd@vm.socket", "dstd@vm.socket"),
)


# --- as installed ---------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_understood(bed: Bed, unit: str) -> None:
    """It ends with status 0 whatever it finds; what it prints counts."""
    done = bed.source.run("systemd-analyze", "verify", "--man=no", unit)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("unit", [unit for unit in UNITS if "service" in unit])
def test_sandboxes_are_tight(bed: Bed, unit: str) -> None:
    """The manager's own account of the unit as it is loaded, drop-ins included."""
    words = ("security", "--threshold=20", "--no-pager")
    bed.source.check("systemd-analyze", *words, unit)


@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_the_user_can_migrate(bed: Bed, program: str) -> None:
    """By the rights that udev's rules and sysusers give."""
    for host in bed.hosts:
        said = host.check("runuser", "-u", "postcopyd", "--", program, "check")
        assert "OK    userfaultfd: permitted through /dev/userfaultfd" in said
        assert "OK    processors stay awake: " in said
        assert "0 FAIL, 0 WARN" in said


def test_nothing_has_failed(bed: Bed) -> None:
    for host in bed.hosts:
        assert host.systemctl("list-units", "--failed", "--plain", "-q") == ""


# --- a guest moves ----------------------------------------------------------------


def test_clients_start_daemons(bed: Bed, name: str) -> None:
    """By socket activation, as their user; nobody starts the guest of a stopped one."""
    with moving(bed, name) as move:
        for side in move.sides:
            assert side.host.show(side.unit, "User") == "postcopyd"
            assert side.host.show(side.unit, "ActiveState") == "active"
            assert side.host.show(side.socket, "ActiveState") == "active"
            side.qmp.close()
            side.host.systemctl("stop", side.unit)
            assert side.host.show(side.unit, "ActiveState") == "inactive"
            side.connect()
            assert side.execute("query-status")["running"] == (side is move.src)
            assert side.host.show(side.unit, "ActiveState") == "active"


def test_precopy(bed: Bed, name: str) -> None:
    with moving(bed, name) as move:
        bed.link.shape(64 * MIB)
        prepare(move.src, move.dst)
        move.dst.execute("migrate-incoming", uri=LISTEN)
        move.src.set_parameters(max_bandwidth=0)
        move.src.migrate(move.there)
        move.wait_completed()
        assert move.dst.ours["precopy-pages"] > 0
        assert not move.src.execute("query-status")["running"]
        # A guest that has moved does not come back with its daemon.
        move.src.host.systemctl("stop", move.src.guest)
        move.src.host.systemctl("restart", "--no-block", move.src.unit)
        move.src.host.wait(
            move.src.unit, "StatusText", "waiting for a guest to attach at"
        )
        assert move.src.host.show(move.src.guest, "ActiveState") == "inactive"


@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"])
def test_postcopy(bed: Bed, name: str, capabilities: tuple[str, ...]) -> None:
    with moving(bed, name) as move:
        bed.link.shape(20 * MIB)
        move.to_postcopy(*capabilities)
        move.complete()
        assert move.dst.ours["postcopy-pages"] > 0
        assert (move.dst.ours["preempt-pages"] > 0) == move.preempt


def test_there_and_back(bed: Bed, name: str) -> None:
    """The same guest's process is at first a destination and then a source."""
    with moving(bed, name) as move:
        move.to_postcopy()
        move.complete()
        process = move.dst.host.show(move.dst.guest, "MainPID")
        back = move.way_back()
        try:
            back.begin()
            assert back.src.host.show(back.src.guest, "MainPID") == process
            back.to_postcopy()
            back.complete()
            assert back.dst.ours["postcopy-pages"] > 0
        finally:
            back.end()


def test_a_long_and_bad_line(bed: Bed, name: str) -> None:
    """5 ms there and 5 ms back, and one packet of 200 lost: no pause."""
    with moving(bed, name, area="8M") as move:
        bed.link.delay(5, loss_percent=0.5)
        move.to_postcopy()
        move.complete()
        assert "postcopy-paused" not in move.src.statuses + move.dst.statuses
        assert move.dst.query()["postcopy-latency"] > 5e6  # ns: the way was long


# --- what an operator sees of it --------------------------------------------------


def test_status_and_journal(bed: Bed, name: str) -> None:
    with moving(bed, name) as move:
        move.to_postcopy()
        for side in move.sides:
            side.host.wait(side.unit, "StatusText", "postcopy-active: ")
        move.complete()
        src, dst = move.sides
        line = src.host.wait(src.unit, "StatusText", "completed: 100 % of 64 MiB")
        assert line.endswith("; the guest is postmigrate")
        line = dst.host.wait(dst.unit, "StatusText", "completed: ")
        assert line.endswith("; the guest is running")
    for side in move.sides:
        entries = side.host.journal(side.unit)
        ours = [one for one in entries if one.get("_SYSTEMD_UNIT") == side.unit]
        assert {one["SYSLOG_IDENTIFIER"] for one in ours} == {side.program}
        assert {one["POSTCOPYD_GUEST"] for one in ours} == {name}
        assert {one["POSTCOPYD_SIDE"] for one in ours} == {side.host.name}
        assert {one["PRIORITY"] for one in ours} <= {"4", "6"}, ours
        said = [one["MESSAGE"] for one in ours]
        for status in ("active", "postcopy-active", "completed"):
            assert any(line.endswith(f" becomes {status}") for line in said), said
        (migration,) = {one.get("POSTCOPYD_MIGRATION") for one in ours} - {None}
        found = side.host.check(
            *("journalctl", "-q", "-o", "cat", f"POSTCOPYD_MIGRATION={migration}"),
            "POSTCOPYD_STATUS=postcopy-active",
        )
        assert found.strip().endswith("becomes postcopy-active"), found
        assert len(ours) < 40, "a whole migration is some dozen lines"
        # All of a guest's units at once.
        found = side.host.check(
            *("journalctl", "-q", "-o", "cat", "--output-fields=_SYSTEMD_UNIT"),
            f"POSTCOPYD_GUEST={name}",
        )
        assert {side.unit, side.guest} <= set(found.split()), found
