"""No Python runs per page: its calls do not grow with the guest's RAM."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from common import address, status
from common.guest.base import GuestState
from common.guest.parked import ParkedGuest, RamFile
from common.settings import Settings
from common.status import MigrationStatus as M
from dstd.incoming import IncomingMigration
from srcd.outgoing import OutgoingMigration

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SMALL, LARGE = 8 * MIB, 256 * MIB
# Threads take turns differently in every run; pages would show as a factor of 32.
TOLERANCE = 1.5


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path("/dev/shm") / f"calls-{threading.get_native_id()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.mark.parametrize("capability", [None, "postcopy-ram", "postcopy-preempt"])
async def test_python_calls_do_not_grow_with_ram(
    shm: Path, capability: str | None
) -> None:
    small = await count_calls(shm, SMALL, capability)
    large = await count_calls(shm, LARGE, capability)
    assert small > 0
    assert large < small * TOLERANCE, f"{small} calls for 8 MiB, {large} for 256 MiB"


async def count_calls(shm: Path, size: int, capability: str | None) -> int:
    """Move `size` bytes, every second page with data; the Python calls that took."""
    source = guest(shm / f"source-{size}", size, GuestState.RUNNING)
    target = guest(shm / f"target-{size}", size, GuestState.INCOMING)
    for offset in range(0, size, 8192):
        _write(source, offset)
    settings = Settings()
    settings.set_capabilities(wanted(capability))
    settings.set_parameters({"max-bandwidth": 0})
    outgoing = OutgoingMigration(
        source, settings, status.outgoing(), nothing, lambda _: None
    )
    incoming = IncomingMigration(
        target, settings, status.incoming(), nothing, lambda _: None, lambda: False
    )
    await incoming.listen(address.Tcp("127.0.0.1", "0"))
    port = str(incoming.addresses()[0]["port"])
    outgoing.status.set(M.SETUP)
    if capability:
        outgoing.start_postcopy()
    with Calls() as calls:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incoming.run)
            nursery.start_soon(outgoing.run, address.Tcp("127.0.0.1", port))
    assert outgoing.status.now is M.COMPLETED, outgoing.error
    assert incoming.status.now is M.COMPLETED, incoming.error
    assert outgoing.pump is not None
    sent = outgoing.pump.stats
    assert sent.normal_pages + sent.zero_pages == size // 4096
    assert bool(capability) == (sent.background_pages > 0)
    for side in (source, target):
        side.close()
    incoming.memory.close()
    outgoing.pump.close()
    return calls.count


def guest(path: Path, size: int, state: GuestState) -> ParkedGuest:
    file = RamFile(idstr="ram", path=str(path), size=size)
    return ParkedGuest("none", (file,), state)


def _write(source: ParkedGuest, offset: int) -> None:
    with open(source.blocks[0].fd, "r+b", buffering=0, closefd=False) as file:
        file.seek(offset)
        file.write(b"data")


def wanted(capability: str | None) -> list[dict[str, Any]]:
    names = {"postcopy-ram", capability} if capability else set()
    return [{"capability": name, "state": True} for name in names]


def nothing(name: str, data: object) -> None:
    """Nobody listens to events here."""


class Calls:
    """Counts the calls of Python functions in this thread and in new ones."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _seen(self, frame: object, event: str, arg: object) -> None:
        if event == "call":
            self.count += 1
