"""An operator recovers with one command, which reaches the other host by ssh."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hosts.link import ADDRESSES
from hosts.services import PATIENCE, moving

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts.bed import Bed
    from hosts.services import Move

DONE, PAUSED = 0, 3
KEY = "/root/.ssh/id_ed25519"


@pytest.fixture(scope="module", autouse=True)
def _ssh(bed: Bed) -> None:
    """root of the source may be root at the destination, and they know each other."""
    there = ADDRESSES["destination"]
    bed.source.check("sh", "-euc", f"echo {there} destination >>/etc/hosts")
    bed.source.check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY)
    public = bed.source.check("cat", f"{KEY}.pub")
    bed.destination.write("/root/.ssh/authorized_keys", public)
    known = bed.destination.check("cat", "/etc/ssh/ssh_host_ed25519_key.pub")
    bed.source.write("/root/.ssh/known_hosts", f"destination {known}")
    # A link that is down is found out soon.
    bed.source.write("/root/.ssh/config", "ConnectTimeout 1\nBatchMode yes\n")


EXAMPLES = "/usr/share/doc/postcopyd/examples"


def script(move: Move) -> tuple[int, str]:
    """The document's script, which needs nothing but a shell and ssh."""
    words = (
        f"srcd proxy --qmp /run/postcopyd/srcd-{move.name}.qmp",
        f"ssh destination dstd proxy --qmp /run/postcopyd/dstd-{move.name}.qmp",
    )
    done = move.src.host.run(f"{EXAMPLES}/recover.sh", *words, move.there)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout + done.stderr


def recover(move: Move) -> tuple[int, str]:
    """The exit status, and what it said."""
    control = f"/run/postcopyd/{move.src.program}-{move.name}.qmp"
    words = ("srcd", "recover", "--qmp", control, "--peer", "ssh:destination")
    done = move.src.host.run(*words)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout + done.stderr


BROKEN: dict[str, Callable[[Move], None]] = {
    "cable": lambda move: move.bed.link.down("destination"),
    "half-open": lambda move: move.bed.link.half_open("source"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_network_that_is_back(bed: Bed, name: str, broken: str) -> None:
    """Before that it says what it cannot reach, and does no harm."""
    with moving(bed, name) as move:
        move.to_postcopy()
        BROKEN[broken](move)
        move.src.wait_query("postcopy-paused")
        status, said = recover(move)
        assert status == PAUSED
        assert "cannot talk to destination:" in said
        bed.link.repair()
        # Hosts need a moment to find each other after a cut; once more is no harm.
        deadline = time.monotonic() + PATIENCE
        while recover(move)[0] != DONE:
            assert time.monotonic() < deadline
        move.wait_pages(50)
        move.complete()


def test_by_script(bed: Bed, name: str) -> None:
    with moving(bed, name) as move:
        move.to_postcopy()
        bed.link.reset()
        move.src.wait_query("postcopy-paused")
        assert script(move)[0] == DONE
        move.complete()


def test_one_side_alone_knows(bed: Bed, name: str) -> None:
    """The other one would wait for very long for a dead connection."""
    with moving(bed, name, peer_timeout=600) as move:
        move.to_postcopy()
        bed.link.half_open("source")
        move.src.wait_query("postcopy-paused")
        bed.link.repair()
        assert move.dst.query()["status"] == "postcopy-active"
        assert recover(move)[0] == DONE
        move.complete()


def test_daemons_were_killed(bed: Bed, name: str) -> None:
    """At both ends, and the command does what is left to do."""
    with moving(bed, name) as move:
        move.to_postcopy()
        for side in move.sides:
            side.kill()
        for side in move.sides:
            side.host.wait(side.unit, "NRestarts", "1")
        assert recover(move)[0] == DONE
        move.reconnect()
        move.complete()
        # Once more does no harm.
        assert recover(move)[0] == DONE
