"""What is between the two hosts, and all the ways in which it breaks.

A switch: each host has a cable to it. The hosts' own rules and interfaces are
touched for `half_open` and `reset` alone, so that what they see of everything
else is what they would see of a network that broke somewhere.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDES = ("source", "destination")
ADDRESSES = {"source": "10.77.0.1", "destination": "10.77.0.2"}
DELAYER = Path(__file__).with_name("delayer.py")
BURST = 64 << 10  # bytes that go at full speed
QUEUE_MS = 50
PATIENCE = 30.0


class Link:
    """The network of a bed whose first process is `pid`."""

    def __init__(self, pid: int) -> None:
        self._enter = ["nsenter", "-t", str(pid), "--mount", "--net"]
        self._delayer: subprocess.Popen[bytes] | None = None

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            [*self._enter, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def _inside(self, side: str, *words: str) -> str:
        """In the network namespace of a host."""
        return self._run("ip", "netns", "exec", side, *words)

    # --- speed --------------------------------------------------------------

    def shape(self, bytes_per_second: int) -> None:
        """So much in either direction."""
        for side in SIDES:
            rate = ("rate", f"{bytes_per_second}bps", "burst", str(BURST))
            words = ("qdisc", "replace", "dev", f"to-{side}", "root", "tbf")
            self._run("tc", *words, *rate, "latency", f"{QUEUE_MS}ms")

    def delay(self, milliseconds: float, loss_percent: float = 0) -> None:
        """A long way with a bad line: every packet goes through a program."""
        self._run("ip", "link", "set", "to-destination", "nomaster")
        words = (str(milliseconds), str(loss_percent))
        command: Sequence[str] = (*self._enter, sys.executable, str(DELAYER), *words)
        self._delayer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._delayer.stdout
        assert self._delayer.stdout.readline() == b"ready\n"

    # --- breaking -----------------------------------------------------------

    def down(self, side: str) -> None:
        """Pull the cable of a host: its interface has no carrier."""
        self._run("ip", "link", "set", f"to-{side}", "down")

    def drop(self, *sides: str) -> None:
        """Packets to these hosts are lost, to both if none is named."""
        self._run("nft", "add", "table", "bridge", "cut")
        hook = "{ type filter hook forward priority 0; }"
        self._run("nft", "add", "chain", "bridge", "cut", "forward", hook)
        for side in sides or SIDES:
            rule = ("bridge", "cut", "forward", "oifname", f"to-{side}", "drop")
            self._run("nft", "add", "rule", *rule)

    def half_open(self, side: str) -> None:
        """This host's connections are gone, and the other one hears nothing."""
        self.drop()
        self._inside(side, "ss", "-K", "dst", ADDRESSES[_other(side)])

    def reset(self) -> None:
        """Both hosts' connections are reset; the network is good."""
        self._inside("source", "ss", "-K", "dst", ADDRESSES["destination"])

    # --- mending ------------------------------------------------------------

    def mend(self) -> None:
        """As it was in the beginning, shaping included."""
        self.undrop()
        for side in SIDES:
            self._run("ip", "link", "set", f"to-{side}", "up")
            self._run("sh", "-c", f"tc qdisc del dev to-{side} root 2>&- || :")
        self.close()
        self._run("ip", "link", "set", "to-destination", "master", "wire")

    def repair(self) -> None:
        """Not broken any more, and as slow as before."""
        self.undrop()
        for side in SIDES:
            self._run("ip", "link", "set", f"to-{side}", "up")

    def undrop(self) -> None:
        self._run("sh", "-c", "nft delete table bridge cut 2>&- || :")

    def close(self) -> None:
        """End the program that delays, if there is one."""
        if self._delayer:
            self._delayer.kill()
            self._delayer.communicate(timeout=PATIENCE)
            self._delayer = None
            self._run("ip", "link", "del", "far")


def _other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]
