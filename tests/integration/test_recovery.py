"""A postcopy whose connection is lost goes on where it was: nothing is lost.

The guest's own check of its memory proves the result. Counters prove that the
cut came in the middle of postcopy and that pages came on both sides of it.
"""

from __future__ import annotations

import random
import socket
import time
from typing import TYPE_CHECKING

import pytest
from support.daemons import (
    POSTCOPY,
    PREEMPT,
)
from support.recovery import LITTLE, Ends, both_ways, in_postcopy
from support.relay import Cable, Link, Trap

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = [pytest.mark.userfaultfd]

CUT_TIMES = 30
# Before a peer that says nothing is given up.
SHORT = ("--peer-timeout", "1")


def pause_at_source(ends: Ends) -> None:
    ends.src.execute("migrate-pause")
    # It breaks the connection before the status says so.
    ends.src.wait_status("postcopy-paused")
    told = ends.src.query()["error-desc"]
    assert told == "Postcopy migration is paused by the user"


def pause_at_destination(ends: Ends) -> None:
    ends.dst.execute("migrate-pause")


def reset(*channels: int) -> Callable[[Ends], None]:
    def cut(ends: Ends) -> None:
        links = ends.relay.wait_links(ends.channels)
        for number in channels:
            links[min(number, len(links) - 1)].reset()

    return cut


def close(*channels: int) -> Callable[[Ends], None]:
    def cut(ends: Ends) -> None:
        links = ends.relay.wait_links(ends.channels)
        for number in channels:
            links[min(number, len(links) - 1)].close()

    return cut


CUTS = {
    "pause-source": pause_at_source,
    "pause-destination": pause_at_destination,
    "reset-main": reset(0),
    "close-main": close(0),
    "reset-preempt": reset(1),
    "close-preempt": close(1),
    "reset-both": reset(0, 1),
    "close-both": close(1, 0),
}
ONE_CHANNEL = [name for name in CUTS if "preempt" not in name and "both" not in name]
CASES = [
    *((name, POSTCOPY) for name in ONE_CHANNEL),
    *((name, PREEMPT) for name in CUTS),
]


@pytest.mark.parametrize(
    ("cut", "capabilities"),
    CASES,
    ids=[f"{name}-{len(given) - 1}ch" for name, given in CASES],
)
def test_recovery(private_dir: Path, cut: str, capabilities: tuple[str, ...]) -> None:
    with in_postcopy(private_dir, capabilities) as ends:
        CUTS[cut](ends)
        ends.assert_paused()
        here = ends.dst.ours["postcopy-pages"]
        ends.recover()
        ends.complete()
        assert ends.dst.ours["postcopy-pages"] > here
        assert ends.src.statuses == [
            *("setup", "active", "device", "postcopy-active", "postcopy-paused"),
            *("postcopy-recover-setup", "postcopy-recover"),
            *("postcopy-active", "completed"),
        ]
        assert ends.dst.statuses == [
            *("setup", "active", "postcopy-active", "postcopy-paused"),
            *("postcopy-recover", "postcopy-active", "completed"),
        ]
        for side in (ends.src, ends.dst):
            assert "error-desc" not in side.query()


def nobody_there(ends: Ends) -> None:
    """A wrong address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    try_in_vain(ends, f"tcp:127.0.0.1:{port}", "Connection refused")


def closes(ends: Ends) -> None:
    with Trap(hang_up=True) as trap:
        try_in_vain(ends, trap.uri, "closed")
        assert trap.taken == 1


def talks_garbage(ends: Ends) -> None:
    """What no destination says, and what only an asked one says."""
    for says, why in (
        (b"\0\x63\0\0", "unknown return path message"),
        (b"\0\x05\0\x05\x04none", "unexpected return path message"),
        (b"\0\x06\0\x04\0\0\0\x01", "unexpected return path message"),
        (b"\0\x01\0\x04\0\0\0\x01", "the peer refused"),
    ):
        with Trap(says=says) as trap:
            try_in_vain(ends, trap.uri, why)


def says_nothing(ends: Ends) -> None:
    with Trap() as trap:
        try_in_vain(ends, trap.uri, "does not answer")
        assert trap.taken == 1


def try_in_vain(ends: Ends, uri: str, why: str) -> None:
    ends.src.execute("migrate", uri=uri, resume=True)
    ends.src.wait_status("postcopy-recover-setup")
    ends.src.wait_status("postcopy-paused")
    assert why in ends.src.query()["error-desc"]


def speak(ends: Ends, said: bytes, why: str) -> None:
    """Somebody else connects to the destination instead of the source."""
    (address,) = ends.dst.query()["socket-address"]
    with socket.create_connection((address["host"], int(address["port"]))) as sock:
        sock.sendall(said)
        ends.dst.wait_status("postcopy-recover")
        if not why:
            sock.shutdown(socket.SHUT_WR)
        ends.dst.wait_status("postcopy-paused")
    assert why in ends.dst.query()["error-desc"]


def begins_anew(ends: Ends) -> None:
    speak(ends, b"QEVM\0\0\0\3", "unexpected in a recovery")


def source_goes(ends: Ends) -> None:
    speak(ends, b"", "")


def source_says_nothing(ends: Ends) -> None:
    speak(ends, b"\x08", "the source does not resume")


def asks_nonsense(ends: Ends) -> None:
    speak(ends, b"\x08\0\x0a\0\x05\x04none", "a RAM block that is not here")


def pause_in_handshake(ends: Ends) -> None:
    """As QEMU's test does: nothing but an order ends it."""
    with Trap() as trap:
        ends.src.execute("migrate", uri=trap.uri, resume=True)
        ends.src.wait_status("postcopy-recover")
        assert "error-desc" not in ends.src.query()
        ends.src.execute("migrate-pause")
        ends.src.wait_status("postcopy-paused")
    (address,) = ends.dst.query()["socket-address"]
    with socket.create_connection((address["host"], int(address["port"]))):
        ends.dst.wait_status("postcopy-recover")
        ends.dst.execute("migrate-pause")
        ends.dst.wait_status("postcopy-paused")


IN_VAIN = {
    "wrong-address": (nobody_there, ()),
    "peer-closes": (closes, ()),
    "peer-talks-garbage": (talks_garbage, ()),
    "peer-is-silent": (says_nothing, SHORT),
    "begins-anew": (begins_anew, ()),
    "source-goes": (source_goes, ()),
    "source-is-silent": (source_says_nothing, SHORT),
    "asks-nonsense": (asks_nonsense, ()),
    "paused-in-handshake": (pause_in_handshake, ()),
}


@pytest.mark.parametrize("in_vain", IN_VAIN)
def test_recovery_in_vain_first(private_dir: Path, in_vain: str) -> None:
    """The second try, at the address where the destination listens anyway."""
    capabilities = random.Random(in_vain).choice([POSTCOPY, PREEMPT])
    try_first, options = IN_VAIN[in_vain]
    with in_postcopy(private_dir, capabilities, *options) as ends:
        pause_at_source(ends)
        ends.assert_paused()
        try_first(ends)
        (address,) = ends.dst.query()["socket-address"]
        ends.recover(f"tcp:{address['host']}:{address['port']}")
        ends.complete()


@both_ways
def test_many_cuts(private_dir: Path, capabilities: tuple[str, ...]) -> None:
    """Each in the middle of pages that come, in turns of all kinds."""
    cuts = random.Random(30)
    with in_postcopy(private_dir, capabilities) as ends:
        for _ in range(CUT_TIMES):
            ends.wait_pages(cuts.randrange(1, 50))
            links = ends.relay.links[-ends.channels :]
            cuts.choice([Link.reset, Link.close])(cuts.choice(links))
            ends.assert_paused()
            ends.recover()
            ends.wait_both("postcopy-active")
        ends.complete()
        assert ends.src.statuses.count("postcopy-paused") == CUT_TIMES
        assert ends.dst.statuses.count("postcopy-paused") == CUT_TIMES


@pytest.mark.netns
@both_ways
def test_silent_death(private_dir: Path, capabilities: tuple[str, ...]) -> None:
    """The cable is out: nobody says anything, and both notice it in time."""
    options = ("--peer-timeout", "2")
    with in_postcopy(private_dir, capabilities, *options, network=Cable) as ends:
        cut = time.monotonic()
        ends.relay.drop(0, 1)
        ends.assert_paused()
        # Keepalive looks once a second; the source gives the peer's last words
        # two more.
        assert time.monotonic() - cut < 8
        ends.relay.deliver(0, 1)
        ends.recover()
        ends.complete()


def test_recovery_with_copied_pages(private_dir: Path) -> None:
    """As on kernels before 5.14."""
    copy = (*LITTLE, "--place", "copy")
    with in_postcopy(private_dir, PREEMPT, only_destination=copy) as ends:
        reset(0, 1)(ends)
        ends.assert_paused()
        ends.recover()
        ends.complete()
        assert ends.dst.ours["way"] == "copy"


@pytest.mark.hugepages
@both_ways
def test_recovery_of_huge_pages(
    private_dir: Path,
    reserve_hugepages: Callable[[int], None],
    capabilities: tuple[str, ...],
) -> None:
    """Of a huge page under way nothing is left, and it comes again."""
    reserve_hugepages(2 * 32)
    huge = ("--memory", "64M", "--hugepages", "2M")
    # Each page that it looks at brings 512, so it must not look at many.
    slowly = (*huge, "--append", "write-rate=1M")
    with in_postcopy(
        private_dir, capabilities, only_source=slowly, only_destination=huge
    ) as ends:
        ends.relay.links[-1].reset()
        ends.assert_paused()
        ends.recover()
        ends.complete()
        assert ends.src.ours["urgent-pages"] % 512 == 0
