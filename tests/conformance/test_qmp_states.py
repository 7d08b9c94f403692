"""Commands in the states of a migration: QEMU and the daemons answer alike.

As test_qmp.py, but each scenario has a QEMU and a daemon of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from conformance.scenarios import SCENARIOS
from support import differences
from support.daemons import Destination, Source
from support.exchanges import first_difference
from support.parked import fill, ram_arguments, shared_ram
from support.qemu import Qemu
from support.ram import MIB, Block
from support.scenarios import Player, Scenario

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

MEANT = differences.rows("Scenarios")


def played(scenario: Scenario, folder: Path) -> tuple[Player, Player]:
    """QEMU's part and ours."""
    waits = scenario.end == "destination"
    players = []
    for who in ("qemu", "ours"):
        (folder / who).mkdir()
    with ExitStack() as stack:
        path = f"{folder}/qemu/monitor"
        arguments = ("-qmp", f"unix:{path},server=on,wait=off")
        qemu = stack.enter_context(
            Qemu(Block("ram", 8 * MIB), incoming=waits, arguments=arguments)
        )
        qemu.fill(1)
        rams = stack.enter_context(shared_ram(qemu))
        if not waits:
            fill(rams, 1)
        daemon = (Destination if waits else Source)(
            folder / "ours", *ram_arguments(qemu, rams)
        )
        stack.enter_context(daemon)
        for who, at in (("qemu", path), ("ours", str(daemon.qmp_path))):
            players.append(Player(at, folder / who))
            players[-1].play(scenario)
    return players[0], players[1]


@pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=lambda scenario: f"{scenario.end} {scenario.name}"
)
def test_they_say_the_same(scenario: Scenario, private_dir: Path) -> None:
    qemu, ours = played(scenario, private_dir)
    name = f"{scenario.end} {scenario.name}"
    meant = [row for row in MEANT if row.subject == name]
    for a, b in zip(_steps(qemu), _steps(ours), strict=True):
        row = next((row for row in meant if _fits(row, a, b)), None)
        if row:
            meant.remove(row)
        else:
            assert b == a
    assert not meant, "the document says that they differ"


def _steps(player: Player) -> list[Any]:
    return [*player.said, player.events]


def _fits(row: differences.Row, theirs: Any, ours: Any) -> bool:
    if theirs == ours:
        return False
    a, b = first_difference([theirs], [ours])
    return differences.matches(row.qemu, a) and differences.matches(row.ours, b)


@pytest.mark.parametrize("row", MEANT, ids=lambda row: row.subject)
def test_every_difference_is_of_a_scenario(row: differences.Row) -> None:
    assert row.subject in [f"{s.end} {s.name}" for s in SCENARIOS]
    assert row.why
