"""The contender srcd -> dstd: the installed daemons with their built-in guest."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import account
import guest
from figures import Figures, Process
from memory import GuestMemory, Sampler
from support.daemons import POSTCOPY, PREEMPT, Daemon, Destination, Source

from common.qmp.client import QmpClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cases import Case
    from relay import Link

NAME: Final = "postcopyd"
PLENTY: Final = 100 << 30  # bytes per second: no limit
PATIENCE: Final = 300.0  # seconds


def run(case: Case, directory: Path, link: Link | None = None) -> Figures:
    """One migration of `case`; its files go into `directory`, which is empty."""
    with ExitStack() as stack:
        enter = stack.enter_context
        src = enter(Source(directory, *options(case), "--append", guest.line(case)))
        # Nothing is given to zeroes, but what is free beforehand looks too little.
        more = ["--overcommit"] if case.zeroed else []
        dst = enter(Destination(directory, *options(case), *more))
        ram = [enter(GuestMemory.of_process(s.process.pid)) for s in (src, dst)]
        ram[0].wait_filled()
        if case.zeroed:
            ram[0].fill_zeroes()
        prepare(case, src, dst)
        address = dst.listen()
        if link:
            address = enter(link.to(address))
        return measure(case, src, dst, ram, address)


def options(case: Case) -> list[str]:
    words = ["--memory", str(case.memory), "--vcpus", str(case.vcpus)]
    return words if case.page_size == 4096 else [*words, "--hugepages", "2M"]


def prepare(case: Case, src: Source, dst: Destination) -> None:
    wanted: tuple[str, ...] = ()
    if case.postcopy:
        wanted = PREEMPT if case.preempt else POSTCOPY
    for side in (src, dst):
        side.set_capabilities(*wanted)
    src.set_parameters(max_bandwidth=PLENTY, max_postcopy_bandwidth=case.bandwidth)


def measure(
    case: Case,
    src: Source,
    dst: Destination,
    ram: list[GuestMemory],
    address: str,
) -> Figures:
    source, destination = ram
    account.pretouch(case.memory)
    sides = {"source": src, "destination": dst}
    usage = {role: account.Usage(pids(side)) for role, side in sides.items()}
    with (
        QmpClient(str(src.qmp_path)) as asked,
        Sampler(lambda: data_sent(asked), watched=case.watched) as sampler,
    ):
        begun = time.time()
        src.migrate(address)
        moving = seconds(status(src, "active"))
        if case.postcopy:
            src.execute("migrate-start-postcopy")
        stopped = seconds(event(src, "STOP"))
        before = source.report()
        resumed = seconds(event(dst, "RESUME"))
        completed = max(seconds(status(side, "completed")) for side in (src, dst))
        after = destination.report()
    if after.wrong:
        raise RuntimeError(f"the guest found wrong pages: {after}")
    sent = src.query()
    moved = sent["ram"]["normal-bytes"]
    if case.postcopy:
        moving, moved = stopped, moved - sent["ram"]["precopy-bytes"]
    return Figures(
        contender=NAME,
        case=case.name,
        moved_bytes=moved,
        total_seconds=completed - begun,
        moving_seconds=completed - moving,
        latency=guest.latency(before, after, case.faulted_us)
        if case.postcopy
        else None,
        downtime_ms=(resumed - stopped) * 1000,
        processes={role: process(sides[role], used) for role, used in usage.items()},
        allocated_at_source=source.allocated(),
        allocated_at_destination=destination.allocated(),
        timeline=sampler.timeline,
        phases=phases(sent, dst.query()),
    )


# -- pages


def data_sent(client: QmpClient) -> int:
    """Bytes of pages with data that have left the source.

    How much the destination holds would tell more than has arrived: dstd takes
    memory ahead.
    """
    info: Any = client.execute("query-migrate")
    return info.get("ram", {}).get("normal-bytes", 0)


# -- events


def event(side: Daemon, name: str, **data: str) -> Mapping[str, Any]:
    """The next event of that name; RuntimeError with the daemon's account."""
    try:
        return side.qmp.wait_event(name, PATIENCE, **data)
    except TimeoutError:
        raise RuntimeError(f"{side.program}: no {name}: {side.query()}") from None


def status(side: Daemon, wanted: str) -> Mapping[str, Any]:
    """The event of the migration's coming to a status."""
    while True:
        seen = event(side, "MIGRATION")
        now = seen["data"]["status"]
        if now == wanted:
            return seen
        if now in ("failed", "cancelled", "postcopy-paused"):
            raise RuntimeError(f"{side.program}: {side.query()}")


def seconds(event: Mapping[str, Any]) -> float:
    """When it happened, by the wall clock."""
    stamp = event["timestamp"]
    return stamp["seconds"] + stamp["microseconds"] / 1e6


# -- processes


def pids(side: Daemon) -> list[int]:
    """The daemon and its guest's VMM."""
    pid = side.process.pid
    children = (
        (task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()
    )
    return [pid, *(int(child) for line in children for child in line.split())]


def process(side: Daemon, used: account.Usage) -> Process:
    own, vcpus = used.end()
    memory = sum(account.own_bytes(pid) for pid in pids(side))
    return Process(cpu_seconds=own, vcpu_seconds=vcpus, own_bytes=memory)


def phases(
    sent: Mapping[str, Any], got: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Parts of the downtime in ms; of a fault, on both sides, in us."""
    ours, theirs = sent["x-postcopyd"], got["x-postcopyd"]
    parts = {**ours["fault-phases"], **theirs["fault-phases"]}
    return {
        "downtime": dict(ours["downtime-parts"]),
        "pages": {side: ours[f"{side}-pages"] for side in ("background", "urgent")},
        "fault": microseconds(theirs["fault-latency"]),
        **{f"fault: {name}": microseconds(part) for name, part in parts.items()},
    }


def microseconds(histogram: Mapping[str, int]) -> dict[str, float]:
    """Of percentiles in nanoseconds, and a count."""
    return {
        name: value if name == "count" else value / 1000
        for name, value in histogram.items()
    }
