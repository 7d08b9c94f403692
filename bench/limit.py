"""The contender that is none: what the kernel gives when nothing else is there.

Two programs of bench/native, built here when they are first needed. A case
with postcopy and a guest that works is one of `limit_fault`: the same guest,
whose pages come back over TCP by as few system calls as there can be. Any other
is one of `limit_stream`: pages over TCP into memory by the cheapest way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import guest
from figures import Figures, Process
from support.report import Report

if TYPE_CHECKING:
    from cases import Case
    from relay import Link

NAME: Final = "limit"
ROOT: Final = Path(__file__).resolve().parents[1]
BUILD: Final = ROOT / "build" / "bench-native"
KERNEL: Final = Path(str(resources.files("common.native"))) / "bin/test-guest.elf"
PROGRAMS: Final = ("limit_fault", "limit_stream")
PATIENCE: Final = 300.0  # seconds

HUGE_PAGE: Final = 2 << 20
STREAM_WAY: Final = "buffer-2m"
"""The cheapest of limit_stream's ways that leave the pages with the guest."""
LONGEST_BACKGROUND: Final = 60.0
"""Seconds; pages that take longer are left to faults alone."""


def run(case: Case, directory: Path, link: Link | None = None) -> Figures:
    """The least that `case` could cost; its files go into `directory`.

    A guest that is idle faults on nothing, and in precopy no guest does: these
    are streams, over loopback only.
    """
    if case.postcopy and case.mode != "idle":
        return faults(case, directory, link)
    if link:
        raise ValueError(f"{case.name}: no limit is known for a stream over a link")
    return stream(STREAM_WAY, _whole(case.used), case.name)


def faults(case: Case, directory: Path, link: Link | None = None) -> Figures:
    """limit_fault: all pages, or as long as LONGEST_BACKGROUND allows."""
    words = [str(_program("limit_fault")), *_options(case), "--reports", str(directory)]
    told = _relayed(words, link) if link else _told(words)
    before, after = (_report(directory / name) for name in ("before", "after"))
    if told["wrong"]:
        raise RuntimeError(f"the guest found wrong pages: {after}")
    background = bool(told["timeline"])
    moved = told["area_bytes"] if background else told["faults"] * case.page_size
    return Figures(
        contender=NAME,
        case=case.name,
        moved_bytes=moved,
        total_seconds=told["seconds"],
        moving_seconds=told["seconds"],
        latency=guest.latency(before, after, case.faulted_us),
        processes=_fault_processes(told),
        timeline=[(seconds, count) for seconds, count in told["timeline"]],
        faults_per_second=told["faults"] / told["seconds"],
    )


def stream(way: str, size: int, case: str = "") -> Figures:
    """limit_stream: `size` bytes, a multiple of 2 MiB, by one of its ways.

    The time and the work of preparing the memory are part of the figures.
    """
    words = [str(_program("limit_stream")), "--way", way, "--size", str(size)]
    told = _told(words)
    if told["wrong"]:
        raise RuntimeError(f"{told['wrong']} pages are wrong after {words}")
    seconds = told["seconds"] + told["prepare_seconds"]
    used = {
        "source": told["sender_cpu_seconds"],
        "destination": told["receiver_cpu_seconds"],
    }
    return Figures(
        contender=NAME,
        case=case or f"stream-{way}",
        moved_bytes=told["bytes"],
        total_seconds=seconds,
        moving_seconds=seconds,
        processes={
            role: Process(cpu_seconds=cpu, vcpu_seconds=0.0, own_bytes=0)
            for role, cpu in used.items()
        },
        phases={"stream": {"prepare": told["prepare_seconds"] * 1000}},
    )


def _whole(size: int) -> int:
    """Up to the next multiple of 2 MiB."""
    return -(-size // HUGE_PAGE) * HUGE_PAGE


def _options(case: Case) -> list[str]:
    words = ["--kernel", str(KERNEL), "--append", guest.line(case)]
    words += ["--memory", str(case.memory), "--vcpus", str(case.vcpus)]
    if case.page_size == HUGE_PAGE:
        words += ["--hugepages"]
    if case.bandwidth and case.used / case.bandwidth > LONGEST_BACKGROUND:
        return [*words, "--seconds", str(int(LONGEST_BACKGROUND))]
    return [*words, "--background", "--rate", str(case.bandwidth)]


def _fault_processes(told: dict[str, Any]) -> dict[str, Process]:
    """One process is the destination and the guest's VMM."""
    return {
        "source": Process(
            cpu_seconds=told["server_cpu_seconds"],
            vcpu_seconds=0.0,
            own_bytes=told["server_own_bytes"],
        ),
        "destination": Process(
            cpu_seconds=told["handler_cpu_seconds"] + told["background_cpu_seconds"],
            vcpu_seconds=told["vcpu_seconds"],
            own_bytes=told["own_bytes"],
        ),
    }


def _report(path: Path) -> Report:
    return Report.parse(path.read_bytes())


# -- programs


def _told(words: list[str]) -> dict[str, Any]:
    """What a program prints; CalledProcessError with its words if it fails."""
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _relayed(words: list[str], link: Link) -> dict[str, Any]:
    """The same with a link between the page server and the guest's side."""
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [*words, "--relay"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        assert process.stdout
        _, listening = process.stdout.readline().split()
        address = stack.enter_context(link.to(f"tcp:{listening}"))
        output, _ = process.communicate(
            f"{address.removeprefix('tcp:')}\n", timeout=PATIENCE
        )
        if process.returncode:
            raise RuntimeError(f"{words[0]} ended with status {process.returncode}")
        told: dict[str, Any] = json.loads(output)
        return told


@cache
def _program(name: str) -> Path:
    """Build the programs, optimised as the installed extension is."""
    if not (BUILD / "build.ninja").exists():
        _quietly("meson", "setup", BUILD, "-Dextension=false", "-Dbench=true")
    _quietly("ninja", "-C", BUILD, *(f"bench/native/{p}" for p in PROGRAMS))
    return BUILD / "bench" / "native" / name


def _quietly(*words: str | Path) -> None:
    """Run a command in the repository; RuntimeError with its output if it fails."""
    tools = Path(sys.executable).parent
    done = subprocess.run(
        words,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{words} failed:\n{done.stdout}")
