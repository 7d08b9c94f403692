"""A control socket with 200 bad clients: the good one does not notice."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import qmp_load
from support.daemons import Source

pytestmark = [pytest.mark.alone]

CLIENTS = 200
ROUNDS = 2
INPUTS = 10_000 // ROUNDS
ANSWER_SECONDS = 0.1
MIB = 1 << 20
GROWTH = 4 * MIB
# While 200 clients are connected, each with what it has not read yet.
AT_THE_TIME = 96 * MIB


def load(path: Path) -> subprocess.Popen[str]:
    words = [sys.executable, qmp_load.__file__, str(path), str(CLIENTS), str(INPUTS)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def worked(srcd: Source) -> float:
    """Seconds that the daemon's one thread for clients has had a processor."""
    schedstat = Path(f"/proc/{srcd.process.pid}/schedstat").read_text()
    return int(schedstat.split()[0]) / 1e9


def stood() -> float:
    """Seconds that this thread was kept from a processor by others."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def waits(
    srcd: Source, until: subprocess.Popen[str]
) -> tuple[list[float], list[float]]:
    """How long a good client waits for each answer, for as long as that runs.

    On the wall's clock, and on the daemon's own: that one stands still while
    something else than the daemon keeps this machine busy. What it did while the
    client was kept from reading an answer is not counted.
    """
    wall, own = [], []
    while until.poll() is None:
        begun, before = time.monotonic(), worked(srcd) - stood()
        assert srcd.execute("query-status")["status"] == "running"
        wall.append(time.monotonic() - begun)
        own.append(worked(srcd) - stood() - before)
        time.sleep(0.002)  # what a client does between two looks
    return wall, own


def test_malformed_inputs_and_bad_clients(private_dir: Path) -> None:
    ram = private_dir / "ram"
    with Source(private_dir, "--ram", f"ram={ram},size={MIB}") as srcd:
        sizes, slowest, peak = [], [], 0
        for _ in range(ROUNDS):
            with load(srcd.qmp_path) as bad:
                assert bad.stdout is not None
                assert bad.stdout.readline() == "loaded\n"
                wall, own = waits(srcd, bad)
                peak = max(peak, srcd.own_memory())
                assert int(bad.stdout.read().removeprefix("answered ")) >= INPUTS
            assert bad.returncode == 0
            assert len(own) > 100, "the load was over before it was measured"
            assert statistics.median(wall) < ANSWER_SECONDS
            slowest.append(max(own))
            sizes.append(srcd.own_memory())
        print(sizes, slowest, max(wall), peak)
        assert max(slowest) < ANSWER_SECONDS, slowest
        assert sizes[-1] < sizes[0] + GROWTH, sizes
        assert peak < sizes[0] + AT_THE_TIME
        assert "Traceback" not in srcd.said
        assert "internal error" not in srcd.said
        descriptors = os.listdir(f"/proc/{srcd.process.pid}/fd")
        assert len(descriptors) < CLIENTS
