"""Everything that can fail in postcopy, at random moments, many times over.

The guest's own check of its memory proves that nothing was lost, counters that
no page came twice. `SEED=… pytest …` does the same again, as far as two
processes and a network do anything twice.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import POSTCOPY, PREEMPT, Destination
from support.ordeal import PAUSED, RECOVER, SETUP, Ordeal
from support.recovery import LITTLE, in_postcopy
from support.relay import Cable, Link, Relay, Trap

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.ordeal import Strike

pytestmark = [pytest.mark.soak, pytest.mark.kvm, pytest.mark.userfaultfd]

SEED = int(os.environ.get("SEED") or random.randrange(1 << 32))
# In each of two migrations, one without preempt and one with it.
TIMES = 10
MOMENT = 0.02  # seconds
# Before a peer that says nothing is given up.
SHORT = ("--peer-timeout", "1")


# --- the network ----------------------------------------------------------------


def break_links(how: Callable[[Link], None], *channels: int) -> Strike:
    """Of main (0), preempt (1), or both; in an order by chance."""

    def strike(ordeal: Ordeal) -> None:
        ends = ordeal.ends
        links = ends.relay.links[-ends.channels :]
        chosen = [links[number] for number in channels if number < ends.channels]
        for link in ordeal.random.sample(chosen, len(chosen)):
            how(link)

    return strike


def link_down(ordeal: Ordeal) -> None:
    """Of either end."""
    end = ordeal.random.randrange(2)
    ordeal.ends.relay.down(end)
    ordeal.ends.wait_both(PAUSED)
    ordeal.ends.relay.up(end)


def dropped(ordeal: Ordeal) -> None:
    """What one end sends, or what both do."""
    ends = ordeal.random.choice([(0,), (1,), (0, 1)])
    ordeal.ends.relay.drop(*ends)
    ordeal.ends.wait_both(PAUSED)
    ordeal.ends.relay.deliver(*ends)


# --- orders -----------------------------------------------------------------------


def pause(side: str) -> Strike:
    return lambda ordeal: getattr(ordeal.ends, side).execute("migrate-pause")


def listener_gone(ordeal: Ordeal) -> None:
    """The destination listens elsewhere, and the source does not know it yet."""
    close_all(ordeal)
    ends = ordeal.ends
    ends.dst.wait_status(PAUSED)
    (address,) = ends.dst.query()["socket-address"]
    ends.dst.execute("migrate-recover", uri=ends.relay.here)
    gone = f"tcp:{address['host']}:{address['port']}"
    ordeal.in_vain(gone, "Connection refused")


def wrong_address(ordeal: Ordeal) -> None:
    """Nobody is there, or somebody else."""
    close_all(ordeal)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Trap(says=b"SSH-2.0-OpenSSH\r\n") as other:
        wrong = {
            f"tcp:127.0.0.1:{port}": "Connection refused",
            "unix:/nowhere/at/all": "No such file",
            other.uri: "return path message",
        }
        uri = ordeal.random.choice([*wrong])
        ordeal.in_vain(uri, wrong[uri])


def another_destination(ordeal: Ordeal) -> None:
    """It waits for some other migration: it refuses this one, and runs nothing."""
    close_all(ordeal)
    ends = ordeal.ends
    with Destination(ends.dst.directory, *LITTLE, name="another") as other:
        other.set_capabilities(*(PREEMPT if ends.preempt else POSTCOPY))
        # Closed with something unread it is a reset.
        ordeal.in_vain(other.listen(), "the peer closed the channel", "ECONNRESET")
        assert other.wait_status("failed", "completed") == "failed"
        assert "magic" in other.query()["error-desc"]
        assert not other.execute("query-status")["running"]


# --- the handshake ------------------------------------------------------------------


def silent_peer(ordeal: Ordeal) -> None:
    close_all(ordeal)
    if ordeal.random.randrange(2):
        with Trap() as trap:
            ordeal.in_vain(trap.uri, "does not answer")
    else:
        speak(ordeal, b"\x08", hang_up=False)


def closing_peer(ordeal: Ordeal) -> None:
    """Before it has said anything, or in the middle of a word."""
    close_all(ordeal)
    said = bytes([0, 3, 0, 8, 0])[: ordeal.random.randrange(6)]
    if ordeal.random.randrange(2):
        with Trap(says=said, hang_up=True) as trap:
            ordeal.in_vain(trap.uri, "")
    else:
        speak(ordeal, b"\x08\0\x0b"[: ordeal.random.randrange(4)], hang_up=True)


def speak(ordeal: Ordeal, said: bytes, *, hang_up: bool) -> None:
    """Somebody else connects to the destination instead of the source."""
    ordeal.ends.wait_both(PAUSED)
    dst = ordeal.ends.dst
    (address,) = dst.query()["socket-address"]
    with socket.create_connection((address["host"], int(address["port"]))) as sock:
        sock.sendall(said)
        if hang_up:
            sock.shutdown(socket.SHUT_WR)
        dst.wait_status("postcopy-recover")
        dst.wait_status(PAUSED)


def cut_in_handshake(ordeal: Ordeal) -> None:
    """The new connection does not last either."""
    close_all(ordeal)
    ordeal.ends.wait_both(PAUSED)
    ends, relay = ordeal.ends, ordeal.ends.relay
    made = len(relay.links)
    ordeal.recover()
    main = relay.wait_links(made + 1)[made]
    wait_a_moment(ordeal)
    ordeal.random.choice([Link.close, Link.reset])(main)
    for side, first in ((ends.src, SETUP), (ends.dst, RECOVER)):
        side.wait_status(first)
        side.wait_status(PAUSED)


def wait_a_moment(ordeal: Ordeal) -> None:
    """About as long as it takes to recover; the moment is what it is about."""
    time.sleep(ordeal.random.uniform(0, MOMENT))


# --- processes ----------------------------------------------------------------------


def end(number: int, *sides: str) -> Strike:
    return lambda ordeal: ordeal.restart(number, *sides)


def kill_in_handshake(ordeal: Ordeal) -> None:
    """Or just before it, or behind it."""
    close_all(ordeal)
    ordeal.ends.wait_both(PAUSED)
    ordeal.recover()
    wait_a_moment(ordeal)
    ordeal.restart(signal.SIGKILL, ordeal.random.choice(["src", "dst"]))
    # What is left of the attempt comes to an end, too.
    for link in ordeal.ends.relay.links:
        link.close()
    ordeal.settle()


# --- all of them --------------------------------------------------------------------

close_all = break_links(Link.close, 0, 1)


@dataclass(frozen=True)
class Failure:
    """`strike` leaves it paused, or about to be, and able to recover."""

    strike: Strike
    network: Any = Relay
    options: tuple[str, ...] = ()
    needs_preempt: bool = False
    restarts: tuple[str, ...] = ()
    at_once: bool = True
    """The first attempt to recover succeeds."""


FAILURES = {
    "link-down": Failure(link_down, Cable, SHORT),
    "dropped": Failure(dropped, Cable, SHORT),
    "reset": Failure(break_links(Link.reset, 0, 1)),
    "closed": Failure(close_all),
    "main-reset": Failure(break_links(Link.reset, 0), needs_preempt=True),
    "main-closed": Failure(break_links(Link.close, 0), needs_preempt=True),
    "preempt-reset": Failure(break_links(Link.reset, 1), needs_preempt=True),
    "preempt-closed": Failure(break_links(Link.close, 1), needs_preempt=True),
    "pause-source": Failure(pause("src")),
    "pause-destination": Failure(pause("dst")),
    "listener-gone": Failure(listener_gone),
    "wrong-address": Failure(wrong_address),
    "another-destination": Failure(another_destination),
    "silent-peer": Failure(silent_peer, options=SHORT),
    "closing-peer": Failure(closing_peer),
    "cut-in-handshake": Failure(cut_in_handshake),
    "kill-source": Failure(end(signal.SIGKILL, "src"), restarts=("srcd",)),
    "kill-destination": Failure(end(signal.SIGKILL, "dst"), restarts=("dstd",)),
    "kill-both": Failure(end(signal.SIGKILL, "src", "dst"), restarts=("srcd", "dstd")),
    "kill-in-handshake": Failure(kill_in_handshake, at_once=False),
    "terminate-source": Failure(end(signal.SIGTERM, "src"), restarts=("srcd",)),
    "terminate-destination": Failure(end(signal.SIGTERM, "dst"), restarts=("dstd",)),
}
CASES = [
    pytest.param(
        name,
        capabilities,
        id=f"{name}-{mode}",
        marks=[pytest.mark.netns] if failure.network is Cable else [],
    )
    for name, failure in FAILURES.items()
    for mode, capabilities in (("plain", POSTCOPY), ("preempt", PREEMPT))
    if mode == "preempt" or not failure.needs_preempt
]


@pytest.mark.parametrize(("name", "capabilities"), CASES)
def test_failures(private_dir: Path, name: str, capabilities: tuple[str, ...]) -> None:
    print(f"SEED={SEED}")
    failure = FAILURES[name]
    times = 2 * TIMES if failure.needs_preempt else TIMES
    with in_postcopy(
        private_dir, capabilities, *failure.options, network=failure.network
    ) as ends:
        ordeal = Ordeal(ends, random.Random(f"{SEED}-{name}-{len(capabilities)}"))
        for _ in range(times):
            ordeal.suffer(failure.strike)
        ordeal.complete()
        assert ordeal.pauses == {"srcd": times, "dstd": times}
        if failure.at_once:
            assert ordeal.attempts == times
            assert ordeal.restarts == dict.fromkeys(failure.restarts, times)


# --- very many ------------------------------------------------------------------------

CUTS = 200
# Of these, so often in a hundred.
MIX = {
    **dict.fromkeys(["reset", "closed", "main-reset", "main-closed"], 10),
    **dict.fromkeys(["preempt-reset", "preempt-closed"], 10),
    **dict.fromkeys(["pause-source", "pause-destination"], 10),
    **dict.fromkeys(["cut-in-handshake", "closing-peer"], 5),
    **dict.fromkeys(["listener-gone", "wrong-address"], 2),
    **dict.fromkeys(["kill-source", "kill-destination", "kill-in-handshake"], 2),
}


def test_200_cuts(private_dir: Path) -> None:
    """Of all kinds, in one migration."""
    print(f"SEED={SEED}")
    memory = ("--memory", "1G")
    with in_postcopy(
        private_dir,
        PREEMPT,
        only_source=(*memory, "--append", "write-rate=4M"),
        only_destination=memory,
    ) as ends:
        ordeal = Ordeal(ends, random.Random(SEED))
        names = ordeal.random.choices([*MIX], [*MIX.values()], k=CUTS)
        for name in names:
            ordeal.suffer(FAILURES[name].strike)
        ordeal.complete()
        assert ordeal.pauses == {"srcd": CUTS, "dstd": CUTS}
        assert ordeal.restarts.total() > 0
