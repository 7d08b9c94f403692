"""A source is led to the destination of another migration: no page goes there.

Both guests look alike, so nothing but the number of a migration tells them apart.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from integration.test_recovery_moments import (
    both_wait,
    first_time,
    port_of,
    postcopy,
    recover,
)
from support import stored
from support.daemons import STATUS_SECONDS, Destination, Source
from support.inprocess import Pair, pair
from support.recovery import both_ways, in_postcopy

from common import address
from common.status import MigrationStatus as M
from common.store.directory import Parked, Parking
from common.stream import constants as c
from common.stream import returnpath
from dstd import peer as destination
from dstd.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.userfaultfd]

MIB = 1 << 20
SLOW = MIB // 4  # bytes per second
ASTRAY = "the source belongs to another migration than this destination"
PAUSED, RECOVER = "postcopy-paused", "postcopy-recover"


def address_of(dst: Destination) -> str:
    (place,) = dst.query()["socket-address"]
    return f"tcp:{place['host']}:{place['port']}"


def assert_refused(src: Source, dst: Destination) -> None:
    """They are of two migrations, and both are paused before and after."""
    assert src.query()["status"] == dst.query()["status"] == PAUSED
    had = dst.ours["postcopy-pages"]
    src.execute("migrate", uri=address_of(dst), resume=True)
    for side in (src, dst):
        side.wait_status(RECOVER)
        side.wait_status(PAUSED)
        assert ASTRAY in side.query()["error-desc"]
    assert dst.ours["postcopy-pages"] == had


def pause(src: Source, dst: Destination) -> None:
    src.execute("migrate-pause")
    for side in (src, dst):
        assert side.wait_status(PAUSED, "completed", "failed") == PAUSED


def wait_pages(dst: Destination) -> None:
    """Until it is postcopy for certain; there are others to come."""
    deadline = time.monotonic() + STATUS_SECONDS
    while not dst.ours["postcopy-pages"]:
        assert time.monotonic() < deadline, dst.query()


def restart(*daemons: Source | Destination) -> None:
    """Killed first; what comes up is paused."""
    for daemon in daemons:
        daemon.end()
    for daemon in daemons:
        daemon.start()
        assert daemon.query()["status"] == PAUSED, daemon.said


# --- as processes ------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True], ids=["alive", "killed"])
@both_ways
def test_led_to_each_other(
    tmp_path: Path, capabilities: tuple[str, ...], killed: bool
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        one, two = (
            stack.enter_context(in_postcopy(folder, capabilities)) for folder in folders
        )
        for ends in (one, two):
            pause(ends.src, ends.dst)
            if killed:
                restart(ends.src, ends.dst)
        for _ in range(2):
            assert_refused(one.src, two.dst)
            assert_refused(two.src, one.dst)
        for ends in (one, two):
            ends.recover()
            ends.wait_both("postcopy-active")
            ends.complete()


def park(path: Path, seed: int) -> None:
    with Parking.create(path) as parking:
        parking.set_configuration(stored.CONFIGURATION, advised=True)
        fd = parking.add_block("ram", MIB, stored.PAGE)
        stored.fill(fd, MIB, seed)
        trio.run(parking.commit, stored.STATE, None, "running", "")


@contextmanager
def served(place: Path, seed: int) -> Iterator[tuple[Source, Destination]]:
    """A parked VM on its way into another directory, and paused."""
    place.mkdir()
    park(place / "vm", seed)
    with (
        Source(place, "--parked", str(place / "vm")) as src,
        Destination(place, "--park", str(place / "there")) as dst,
    ):
        for side in (src, dst):
            side.set_capabilities()
        src.set_parameters(max_postcopy_bandwidth=SLOW)
        src.migrate(dst.listen())
        for side in (src, dst):
            side.wait_status("postcopy-active")
        wait_pages(dst)
        pause(src, dst)
        yield src, dst


@pytest.mark.parametrize("killed", [False, True], ids=["alive", "killed"])
def test_parked_led_to_each_other(private_dir: Path, killed: bool) -> None:
    places = [private_dir / name for name in ("one", "two")]
    with served(places[0], 1) as one, served(places[1], 2) as two:
        if killed:
            restart(*one, *two)
        assert_refused(one[0], two[1])
        assert_refused(two[0], one[1])
        for src, dst in (one, two):
            src.set_parameters(max_postcopy_bandwidth=0)
            src.execute("migrate", uri=address_of(dst), resume=True)
            for side in (src, dst):
                assert side.wait_status("completed", "failed") == "completed", side.said
    for place in places:
        contents = []
        for directory in (place / "vm", place / "there"):
            with Parked.open(directory) as parked:
                parked.verify()
                file = directory / parked.manifest.blocks[0].file
                contents.append(file.read_bytes())
        assert contents[0] == contents[1]


# --- in this process ---------------------------------------------------------------


class Told:
    """The PINGs that destinations get; `as_qemu`: they say nothing else to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, as_qemu: bool) -> None:
        self.values: list[int] = []
        ping = destination.Peer.ping

        async def noted(peer: destination.Peer, value: int) -> None:
            self.values.append(value)
            if as_qemu and value == c.PING_HELLO:
                await peer.say(returnpath.Pong(value))
            else:
                await ping(peer, value)

        monkeypatch.setattr(destination.Peer, "ping", noted)

    @property
    def migrations(self) -> list[int]:
        first = c.PING_MIGRATION
        return [v for v in self.values if first <= v < first + c.MIGRATIONS]


def cut_at_the_end(both: Pair) -> None:
    async def lose_it() -> None:
        both.outgoing.channels.main.break_connection()

    first_time(both.outgoing.postcopy, lose_it, "_end")


@pytest.mark.parametrize("as_qemu", [False, True], ids=["dstd", "qemu"])
async def test_only_dstd_is_told(
    monkeypatch: pytest.MonkeyPatch, as_qemu: bool
) -> None:
    told = Told(monkeypatch, as_qemu=as_qemu)
    with pair(4 * MIB, "postcopy-ram") as both:
        cut_at_the_end(both)
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.POSTCOPY_PAUSED)
            await recover(both)
            await both_wait(statuses, M.COMPLETED)
        assert both.outgoing.peer.is_dstd is not as_qemu
        both.assert_equal()
    assert c.PING_SETUP in told.values
    assert len(told.migrations) == (0 if as_qemu else 2)
    assert len(set(told.migrations)) == (0 if as_qemu else 1)


def journals(both: Pair) -> dict[str, Any]:
    return {
        "srcd": both.outgoing._departure.journal,
        "dstd": both.incoming.arrival.journal,
    }


@pytest.mark.parametrize("old", [("srcd",), ("dstd",), ("srcd", "dstd")], ids="-".join)
async def test_records_without_a_number(old: tuple[str, ...]) -> None:
    """Of daemons that knew none: a recovery is possible as before."""
    with pair(4 * MIB, "postcopy-ram") as both:
        cut_at_the_end(both)
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.POSTCOPY_PAUSED)
            for name in old:
                journals(both)[name].write(migration=None)
            await recover(both)
            await both_wait(statuses, M.COMPLETED)
        numbers = {name: j.record.migration for name, j in journals(both).items()}
        both.assert_equal()
    assert numbers["srcd"] is None if "srcd" in old else numbers["srcd"] is not None


async def test_where_the_guest_of_a_qemu_is() -> None:
    """srcd never began that migration, so there is no number to compare."""
    with pair(4 * MIB, "postcopy-ram") as both:
        cut_at_the_end(both)
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.POSTCOPY_PAUSED)
            journal = both.incoming.arrival.journal
            right = journal.record.migration
            journal.write(is_srcd=False, migration=None)
            await recover(both)
            await both_wait(statuses, M.POSTCOPY_PAUSED, 2)
            for side in (both.outgoing, both.incoming):
                assert ASTRAY in str(side.error)
            journal.write(is_srcd=True, migration=right)
            await recover(both)
            await both_wait(statuses, M.COMPLETED)
        both.assert_equal()


def closing(monkeypatch: pytest.MonkeyPatch, both: Pair) -> trio.Event:
    """Set when the destination has done with a connection."""
    closed = trio.Event()
    close = Connection.close

    def noted(link: Connection) -> None:
        close(link)
        if link._arrival is both.incoming.arrival:
            closed.set()

    monkeypatch.setattr(Connection, "close", noted)
    return closed


async def test_where_all_has_come_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that waits for the source to learn that would let it go."""
    with pair(4 * MIB, "postcopy-ram") as one, pair(8 * MIB, "postcopy-ram") as two:
        complete = one.incoming.arrival.complete

        async def lose_it(peer: destination.Peer) -> None:
            one.incoming.pause()
            await complete(peer)

        one.incoming.arrival.complete = lose_it  # type: ignore[method-assign]
        cut_at_the_end(two)
        closed = closing(monkeypatch, one)
        async with postcopy(one) as first, postcopy(two) as second:
            await first[0].wait(M.POSTCOPY_PAUSED)
            await first[1].wait(M.COMPLETED)
            await closed.wait()
            await both_wait(second, M.POSTCOPY_PAUSED)
            closed = closing(monkeypatch, one)
            two.outgoing.resume(address.Tcp("127.0.0.1", port_of(one)))
            await second[0].wait(M.POSTCOPY_PAUSED, 2)
            assert ASTRAY in str(two.outgoing.error)
            await closed.wait()
            one.outgoing.resume(address.Tcp("127.0.0.1", port_of(one)))
            await first[0].wait(M.COMPLETED)
            await recover(two)
            await both_wait(second, M.COMPLETED)
        one.assert_equal()
        two.assert_equal()
