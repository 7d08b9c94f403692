"""What a daemon does with a guest whose daemon has died, at each step."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from support.keeping_guest import KeepingGuest

from common import status
from common.config import GuestConfig, ServeConfig
from common.errors import HostError
from common.guest.base import GuestState
from common.guest.keeping import Keeping, memory_file
from common.monitor import Monitor, guest_runs
from common.settings import Settings
from common.status import MigrationStatus as M
from common.stream.package import Package, encode_package
from dstd import record as incoming
from dstd.commands import DestinationCommands
from srcd import record as outgoing
from srcd.commands import SourceCommands
from srcd.sections import save_device_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
POSTCOPY = {"capability": "postcopy-ram", "state": True}


def config() -> ServeConfig:
    guest = GuestConfig(
        name=None,
        ram=(),
        socket=None,
        machine=None,
        memory=None,
        vcpus=1,
        accel="auto",
        hugepages=None,
        kernel=None,
        append="",
        serial="",
        paused=False,
    )
    return ServeConfig(guest=guest, qmp=())


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[KeepingGuest]:
    made = KeepingGuest(tmp_path / "ram", SIZE, GuestState.PAUSED)
    yield made
    made.close()


def settings() -> Any:
    some = Settings()
    some.set_capabilities([POSTCOPY])
    some.set_parameters({"downtime-limit": 123})
    return some.snapshot()


# --- source ------------------------------------------------------------------------

S = outgoing.Phase
RECORD = outgoing.Record(was_running=True, settings=settings())
# What it had come to; what becomes of the guest, and of the migration.
SOURCES = {
    "precopy": (RECORD, "running", M.NONE),
    "stopped": (replace(RECORD, phase=S.STOPPED), "running", M.NONE),
    "was paused": (
        replace(RECORD, phase=S.STOPPED, was_running=False),
        "prelaunch",
        M.NONE,
    ),
    "dstd waits for our word": (
        replace(RECORD, phase=S.PACKAGED, is_dstd=True, postcopy=True),
        "running",
        M.NONE,
    ),
    "QEMU may run it": (
        replace(RECORD, phase=S.PACKAGED, postcopy=True),
        "finish-migrate",
        M.POSTCOPY_PAUSED,
    ),
    "QEMU may run it after precopy": (
        replace(RECORD, phase=S.PACKAGED),
        "paused",
        M.FAILED,
    ),
    "in postcopy": (
        replace(RECORD, phase=S.GONE, is_dstd=True, postcopy=True),
        "finish-migrate",
        M.POSTCOPY_PAUSED,
    ),
    "dstd may run it after precopy": (
        replace(RECORD, phase=S.GONE, is_dstd=True),
        "paused",
        M.FAILED,
    ),
    "completed": (
        replace(RECORD, phase=S.COMPLETED, postcopy=True),
        "postmigrate",
        M.COMPLETED,
    ),
}


@pytest.mark.parametrize("case", SOURCES)
async def test_source(guest: KeepingGuest, case: str) -> None:
    record, run_state, wanted = SOURCES[case]
    if record.phase is S.HERE:
        guest.state = GuestState.RUNNING
    left = outgoing.new_journal(guest, Keeping(guest))
    left.record = record
    await left.begin()
    left.close()
    async with trio.open_nursery() as nursery:
        monitor = Monitor(guest, None, guest_runs(guest))
        commands = SourceCommands(monitor, nursery)
        await commands.take_up()
        assert monitor.run_state == run_state
        reply: Any = await commands.handlers["query-migrate"]({})
        assert reply.get("status", "none") == wanted
        runs_here = run_state == "running"
        assert (guest.state is GuestState.RUNNING) == runs_here
        if wanted is M.NONE:
            assert "outgoing" not in guest.kept
        else:
            assert monitor.settings.number("downtime-limit") == 123
            assert monitor.settings.on("postcopy-ram")
            assert guest.requests == []
        nursery.cancel_scope.cancel()


# --- destination -------------------------------------------------------------------

D = incoming.Phase
STATES = {state.value: state for state in GuestState}
# Phase, is the source srcd, what the guest does; run state, status.
DESTINATIONS = [
    (D.PACKAGED, False, "paused", "inmigrate", M.POSTCOPY_PAUSED),
    (D.LOADED, True, "paused", "inmigrate", M.POSTCOPY_PAUSED),
    (D.LOADED, True, "running", "running", M.POSTCOPY_PAUSED),
    (D.RUNNING, True, "running", "running", M.POSTCOPY_PAUSED),
    (D.RUNNING, True, "paused", "paused", M.POSTCOPY_PAUSED),
    (D.ARRIVED, True, "paused", "paused", M.FAILED),
    (D.ARRIVED, True, "running", "running", M.COMPLETED),
    (D.COMPLETE, True, "running", "running", M.COMPLETED),
    (D.TOLD, False, "running", "running", M.COMPLETED),
    (D.TOLD, True, "paused", "paused", M.COMPLETED),
]


async def leave(guest: KeepingGuest, record: incoming.Record) -> None:
    keeping = Keeping(guest)
    state = await save_device_state(guest, "running")
    package = encode_package(Package(sections=state.sections))
    for name, length in (
        (incoming.RECEIVED, 1 << 16),
        (incoming.PACKAGE, len(package)),
    ):
        fd = memory_file(name, length)
        await keeping.keep(name, fd)
        os.close(fd)
    os.pwrite(guest.kept[incoming.PACKAGE], package, 0)
    left = incoming.new_journal(guest, keeping)
    left.record = record
    await left.begin()
    left.close()


@pytest.mark.parametrize(
    ("phase", "is_srcd", "state", "run_state", "wanted"),
    DESTINATIONS,
    ids=[f"{c[0]}-{c[2]}" for c in DESTINATIONS],
)
async def test_destination(
    guest: KeepingGuest,
    phase: incoming.Phase,
    is_srcd: bool,
    state: str,
    run_state: str,
    wanted: M,
) -> None:
    guest.state = STATES[state]
    record = incoming.Record(phase=phase, is_srcd=is_srcd, settings=settings())
    await leave(guest, record)
    async with trio.open_nursery() as nursery:
        monitor = Monitor(guest, None, "inmigrate")
        commands = DestinationCommands(monitor, config(), nursery)
        assert await commands.take_up()
        assert monitor.run_state == run_state
        reply: Any = await commands.handlers["query-migrate"]({})
        assert reply["status"] == wanted
        assert monitor.settings.on("postcopy-ram")
        assert guest.requests == []
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("phase", [D.PRECOPY, D.PACKAGED])
async def test_the_source_has_the_guest(
    guest: KeepingGuest, phase: incoming.Phase
) -> None:
    """Whatever came of it is worth nothing; it can come again."""
    guest.state = GuestState.INCOMING
    await leave(guest, incoming.Record(phase=phase, is_srcd=True))
    async with trio.open_nursery() as nursery:
        monitor = Monitor(guest, None, "inmigrate")
        commands = DestinationCommands(monitor, config(), nursery)
        assert not await commands.take_up()
        assert "incoming" not in guest.kept
        assert guest.requests == []
        nursery.cancel_scope.cancel()


async def test_a_loaded_guest_that_runs_at_the_source(guest: KeepingGuest) -> None:
    await leave(guest, incoming.Record(phase=D.PACKAGED, is_srcd=True))
    async with trio.open_nursery() as nursery:
        monitor = Monitor(guest, None, "inmigrate")
        commands = DestinationCommands(monitor, config(), nursery)
        with pytest.raises(HostError, match="runs at the source"):
            await commands.take_up()
        assert guest.requests == ["quit"]
        nursery.cancel_scope.cancel()


async def test_another_guest(guest: KeepingGuest, tmp_path: Path) -> None:
    """What was kept of one guest says nothing about another."""
    await leave(guest, incoming.Record(phase=D.RUNNING, is_srcd=True))
    other = KeepingGuest(tmp_path / "other", SIZE, GuestState.INCOMING)
    other.kept = {name: os.dup(fd) for name, fd in guest.kept.items()}
    assert incoming.new_journal(other, Keeping(other)).find() is None
    other.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"capabilities": [], "parameters": {"of-a-later-release": 1}},
        {"capabilities": [], "parameters": {"downtime-limit": -1}},
        {"capabilities": 7},
    ],
)
async def test_settings_of_another_release(guest: KeepingGuest, settings: Any) -> None:
    """Their daemon has to be there again; the guest waits for it."""
    await leave(guest, incoming.Record(phase=D.RUNNING, settings=settings))
    async with trio.open_nursery() as nursery:
        monitor = Monitor(guest, None, "inmigrate")
        commands = DestinationCommands(monitor, config(), nursery)
        with pytest.raises(HostError, match="go on with the release"):
            await commands.take_up()
        assert guest.requests == []
        assert "incoming" in guest.kept
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "flying"},
        {"phase": None},
        {"section_id": -1},
        {"section_id": 1 << 32},
        {"settings": 7},
        {"address": 7},
        {"address": "tcp"},
    ],
)
def test_record_that_is_none(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "phase": "running",
        "section_id": 2,
        "is_srcd": True,
        "address": None,
        "settings": {},
    }
    assert incoming.record_of_untrusted(good).phase is D.RUNNING
    with pytest.raises(HostError):
        incoming.record_of_untrusted({**good, **change})


def test_status_of_a_new_daemon() -> None:
    for made in (status.outgoing(), status.incoming()):
        assert made.may(M.POSTCOPY_PAUSED)
