"""A migration with postcopy and preempt, driven by programs that we did not write.

By what is typed into `qmp-shell` and into `qmp-shell -H`, by the Python package
`qemu.qmp`, and by lines of the human monitor alone. The guest shows that it has
moved; our own client only looks on.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from qemu.qmp import EventListener, QMPClient
from support.daemons import Destination, Source, assert_unharmed

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.userfaultfd

CAPABILITIES = ("events", "return-path", "postcopy-ram", "postcopy-preempt")
PATIENCE = 60.0
# Slow enough for the guest to ask for pages.
BANDWIDTH = 64 << 20

ALL_ON = ",".join(f'{{"capability":"{name}","state":true}}' for name in CAPABILITIES)
TYPED = {
    "destination": [
        f"migrate-set-capabilities capabilities=[{ALL_ON}]",
        "migrate-incoming uri=URI exit-on-error=false",
        "query-migrate",
    ],
    "source": [
        f"migrate-set-capabilities capabilities=[{ALL_ON}]",
        f"migrate-set-parameters max-bandwidth={BANDWIDTH}",
        f"migrate_set_parameter parameter=max-postcopy-bandwidth value={BANDWIDTH}",
        "migrate uri=URI",
        "migrate-start-postcopy",
    ],
}
SAID = {
    "destination": [
        *(f"migrate_set_capability {name} on" for name in CAPABILITIES),
        "migrate_incoming URI",
        "info migrate",
    ],
    "source": [
        *(f"migrate_set_capability {name} on" for name in CAPABILITIES),
        "migrate_set_parameter max-bandwidth 64M",
        "migrate_set_parameter max-postcopy-bandwidth 64M",
        "migrate -d URI",
        "migrate_start_postcopy",
    ],
}


@pytest.fixture
def pair(private_dir: Path) -> Iterator[tuple[Source, Destination]]:
    with (
        Source(private_dir, "--memory", "128M") as source,
        Destination(private_dir, "--memory", "128M") as destination,
    ):
        yield source, destination


def shell(path: Path, lines: list[str], *options: str) -> str:
    """What `qmp-shell` prints when these lines are typed into it."""
    program = Path(sys.executable).with_name("qmp-shell")
    ran = subprocess.run(
        [str(program), *options, str(path)],
        input="".join(f"{line}\n" for line in lines),
        env={**os.environ, "HOME": str(path.parent)},  # its history goes there
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def type_requests(side: Source | Destination, lines: list[str]) -> None:
    said = shell(side.qmp_path, lines)
    assert "Connected to QEMU 10.0.2" in said
    assert said.count('"return": ') == len(lines), said
    assert '"error"' not in said


def type_lines(side: Source | Destination, lines: list[str]) -> None:
    said = shell(side.qmp_path, lines, "-H")
    assert "QEMU 10.0.2" in said
    assert "Error" not in said
    assert "unknown" not in said


def send_lines(side: Source | Destination, lines: list[str]) -> None:
    for line in lines:
        printed = side.execute("human-monitor-command", command_line=line)
        assert line.startswith("info") or printed == ""


@pytest.mark.parametrize(
    ("drive", "lines"),
    [
        pytest.param(type_requests, TYPED, id="qmp-shell"),
        pytest.param(type_lines, SAID, id="qmp-shell -H"),
        pytest.param(send_lines, SAID, id="human-monitor-command"),
    ],
)
def test_lines_move_a_guest(pair, private_dir: Path, drive, lines) -> None:
    source, destination = pair
    uri = f"unix:{private_dir}/migration"
    before = source.wait_filled()
    for side, name in ((destination, "destination"), (source, "source")):
        drive(side, [line.replace("URI", uri) for line in lines[name]])
    assert_moved(source, destination, before)


def assert_moved(source: Source, destination: Destination, before) -> None:
    """By postcopy, with pages that were asked for on the preempt channel."""
    for side in (source, destination):
        assert side.wait_status("completed", "failed") == "completed", side.query()
        assert "postcopy-active" in side.statuses
    assert source.ours["urgent-pages-on-preempt"] > 0
    assert source.execute("query-status")["status"] == "postmigrate"
    assert destination.execute("query-status")["running"] is True
    assert_unharmed(destination, before)


def test_qemu_qmp_moves_a_guest(pair, private_dir: Path) -> None:
    source, destination = pair
    before = source.wait_filled()
    paths = str(source.qmp_path), str(destination.qmp_path)
    asyncio.run(move(*paths, f"unix:{private_dir}/migration"))
    assert_moved(source, destination, before)


async def move(source_path: str, destination_path: str, uri: str) -> None:
    """As an orchestrator does it: by events."""
    source, destination = QMPClient("source"), QMPClient("destination")
    completed = [EventListener("MIGRATION") for _ in range(2)]
    async with asyncio.timeout(PATIENCE):
        for client, path, events in (
            (source, source_path, completed[0]),
            (destination, destination_path, completed[1]),
        ):
            await client.connect(path)
            client.register_listener(events)
            wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
            await client.execute("migrate-set-capabilities", {"capabilities": wanted})
        limits = {"max-bandwidth": BANDWIDTH, "max-postcopy-bandwidth": BANDWIDTH}
        await source.execute("migrate-set-parameters", limits)
        await destination.execute(
            "migrate-incoming", {"uri": uri, "exit-on-error": False}
        )
        await source.execute("migrate", {"uri": uri})
        await wait_status(completed[0], "active")
        await source.execute("migrate-start-postcopy")
        for events in completed:
            await wait_status(events, "completed")
        await source.disconnect()
        await destination.disconnect()


async def wait_status(events: EventListener, status: str) -> None:
    async for event in events:
        if event["data"]["status"] == status:
            return
