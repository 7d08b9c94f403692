"""What both daemons answer besides migration, around a guest without CPUs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from common.guest.base import GuestState
from common.guest.parked import ParkedGuest, RamFile
from common.monitor import Monitor, guest_runs
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[ParkedGuest]:
    file = RamFile(idstr="ram", path=str(tmp_path / "ram"), size=3 * MIB)
    guest = ParkedGuest("none", [file], GuestState.RUNNING)
    yield guest
    guest.close()


@pytest.fixture
def monitor(guest: ParkedGuest) -> Monitor:
    return Monitor(guest, "vm", "running")


async def call(monitor: Monitor, command: str, **arguments: Any) -> Any:
    return await monitor.handlers[command](arguments)


def events(monitor: Monitor) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []
    monitor.emit = lambda name, data: seen.append((name, data))
    return seen


async def test_identity(monitor: Monitor, guest: ParkedGuest) -> None:
    assert await call(monitor, "query-name") == {"name": "vm"}
    nameless = Monitor(guest, None, "running")
    assert await call(nameless, "query-name") == {}
    uuid = (await call(monitor, "query-uuid"))["UUID"]
    assert uuid == "00000000-0000-0000-0000-000000000000"


async def test_run_state(monitor: Monitor, guest: ParkedGuest) -> None:
    seen = events(monitor)
    await monitor.stop_guest()
    assert guest.state is GuestState.PAUSED
    assert await call(monitor, "query-status") == {"status": "paused", "running": False}
    await monitor.continue_guest()
    assert guest.state is GuestState.RUNNING
    assert await call(monitor, "query-status") == {"status": "running", "running": True}
    assert seen == [("STOP", None), ("RESUME", None)]


@pytest.mark.parametrize(
    ("state", "word"),
    [(GuestState.RUNNING, "running"), (GuestState.PAUSED, "prelaunch")],
)
def test_first_run_state(guest: ParkedGuest, state: GuestState, word: str) -> None:
    guest.state = state
    assert guest_runs(guest) == word


async def test_settings(monitor: Monitor) -> None:
    wanted = [{"capability": "events", "state": True}]
    assert await call(monitor, "migrate-set-capabilities", capabilities=wanted) is None
    assert wanted[0] in await call(monitor, "query-migrate-capabilities")
    await monitor.handlers["migrate-set-parameters"]({"max-bandwidth": 7})
    assert (await call(monitor, "query-migrate-parameters"))["max-bandwidth"] == 7


async def test_end_is_said_once(monitor: Monitor) -> None:
    seen = events(monitor)
    closed: list[bool] = []
    monitor.close = lambda: closed.append(True)
    assert await call(monitor, "quit") is None
    monitor.shut_down("host-signal")
    assert monitor.quitting.is_set()
    reason = {"guest": False, "reason": "host-qmp-quit"}
    assert seen == [("SHUTDOWN", reason)]
    assert closed == [True]


async def test_pmemsave(monitor: Monitor, tmp_path: Path) -> None:
    data = bytes(range(256)) * (3 * MIB // 256)
    (tmp_path / "ram").write_bytes(data)
    for start, size in ((0, 3 * MIB), (1, MIB + 1), (3 * MIB - 1, 1), (5, 0)):
        out = tmp_path / "out"
        await call(monitor, "pmemsave", val=start, size=size, filename=str(out))
        assert out.read_bytes() == data[start : start + size]


async def test_pmemsave_fills_no_hole(monitor: Monitor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    await call(monitor, "pmemsave", val=0, size=3 * MIB, filename=str(out))
    assert out.read_bytes() == bytes(3 * MIB)
    assert (tmp_path / "ram").stat().st_blocks == 0


@pytest.mark.parametrize(
    ("start", "size"), [(3 * MIB, 1), (0, 3 * MIB + 1), (-1, 1), (0, -1), (1 << 62, 1)]
)
async def test_pmemsave_outside_of_ram(
    monitor: Monitor, tmp_path: Path, start: int, size: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CommandError, match="is not RAM"):
        await call(monitor, "pmemsave", val=start, size=size, filename=str(out))
    assert not out.exists()


async def test_pmemsave_refused(monitor: Monitor, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no" / "file")
    text = f"Could not open '{nowhere}': No such file or directory"
    with pytest.raises(CommandError) as error:
        await call(monitor, "pmemsave", val=0, size=1, filename=nowhere)
    assert str(error.value) == text
    monitor.memory_problem = lambda: "it is still arriving"
    with pytest.raises(CommandError, match="still arriving"):
        await call(monitor, "pmemsave", val=0, size=1, filename=nowhere)


async def test_pmemsave_into_a_pipe_that_nobody_reads(
    monitor: Monitor, tmp_path: Path
) -> None:
    """It must not hold a thread, and with it the end of the daemon."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with trio.fail_after(5), pytest.raises(CommandError, match="Could not open"):
        await call(monitor, "pmemsave", val=0, size=1, filename=str(pipe))
