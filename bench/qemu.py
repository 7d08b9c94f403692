"""The contender QEMU -> QEMU: two unmodified QEMUs with KVM and the same guest.

The machine is `microvm`, the smallest with PVH boot, firmware and a serial
port. Its memory is a shared memfd, as our own guest's is.

Times are those of QEMU's events, by the machine's clock; the downtime lasts
from STOP at the source to RESUME at the destination. The guest's first step
after that, which needs some pages, is among the phases, in ms since STOP.
"""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import account
import guest
from figures import Figures, Process
from memory import GuestMemory, Sampler
from support.qemu import Monitor, executable

if TYPE_CHECKING:
    from cases import Case
    from relay import Link

NAME: Final = "qemu"
MEMFD: Final = "memory-backend-memfd"
PLENTY: Final = 100 << 30  # bytes per second: no limit
PATIENCE: Final = 300.0
KERNEL: Final = Path(str(resources.files("common.native"))) / "bin/test-guest.elf"


class BenchError(Exception):
    """QEMU did not do what was asked of it."""


class Machine:
    """One QEMU with the test guest, or waiting for it; its events with times."""

    def __init__(self, case: Case, directory: Path, role: str) -> None:
        self._case = case
        self._incoming = role == "destination"
        self.serial = directory / f"{role}.serial"
        self.log = directory / f"{role}.log"
        self.moments: dict[str, float] = {}
        """First time of each event and status, in seconds of the wall clock."""

    def __enter__(self) -> Self:
        self.socket, theirs = socket.socketpair()
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._words(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        self.monitor = Monitor(self.socket)
        try:
            self.monitor.negotiate()
            self.memory = GuestMemory.of_process(self.pid, MEMFD)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.__exit__()
        self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()

    def _words(self, monitor: int) -> list[str]:
        return [
            str(executable()),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-name", "bench,debug-threads=on"),
            *("-machine", "microvm,memory-backend=ram,auto-kernel-cmdline=off"),
            # The feature's MSR cannot be set under every hypervisor.
            *("-accel", "kvm", "-cpu", "host,arch-capabilities=off"),
            *("-smp", str(self._case.vcpus), "-m", f"{self._case.memory}B"),
            *("-object", _backend(self._case)),
            *("-kernel", str(KERNEL), "-append", _line(self._case)),
            *("-serial", f"file:{self.serial}"),
            *("-chardev", f"socket,id=monitor,fd={monitor}"),
            *("-mon", "chardev=monitor,mode=control"),
            *(("-incoming", "defer") if self._incoming else ()),
        ]

    @property
    def pid(self) -> int:
        return self.process.pid

    def execute(self, command: str, /, **arguments: object) -> Any:  # noqa: ANN401
        """Underscores in the arguments' names stand for dashes."""
        answer = self.monitor.execute(command, **arguments)
        self._note_events()
        return answer

    def wait(self, moment: str, patience: float = PATIENCE) -> float:
        """When an event or a status was first seen; waits until it is."""
        deadline = time.monotonic() + patience
        while moment not in self.moments:
            self.monitor.events.append(self.monitor.next_event(deadline))
            self._note_events()
        return self.moments[moment]

    def _note_events(self) -> None:
        for event in self.monitor.events:
            clock = event["timestamp"]
            name = event.get("data", {}).get("status", event["event"])
            when = clock["seconds"] + clock["microseconds"] / 1e6
            self.moments.setdefault(name, when)
        self.monitor.events.clear()
        if "failed" in self.moments:
            raise BenchError(f"the migration failed: {self.log.read_text()}")


def _backend(case: Case) -> str:
    words = f"memory-backend-memfd,id=ram,size={case.memory}B,share=on"
    if case.page_size > 4096:
        words += f",hugetlb=on,hugetlbsize={case.page_size}B"
    return words


def _line(case: Case) -> str:
    facts = f"vcpus={case.vcpus} tsc-khz={guest.tsc_khz()} rest=halt"
    return f"{guest.line(case)} {facts}"


def run(case: Case, directory: Path, link: Link | None = None) -> Figures:
    """One migration of `case`; its files go into `directory`, which is empty."""
    with ExitStack() as stack:
        enter = stack.enter_context
        source = enter(Machine(case, directory, "source"))
        destination = enter(Machine(case, directory, "destination"))
        source.memory.wait_filled()
        if case.zeroed:
            source.memory.fill_zeroes()
        for side in (source, destination):
            _prepare(case, side)
        uri = _listen(destination)
        if link:
            uri = enter(link.to(uri))
        return _measure(case, source, destination, uri)


def _prepare(case: Case, side: Machine) -> None:
    names = ["events"]
    if case.postcopy:
        names += ["postcopy-ram", "postcopy-blocktime"]
        names += ["postcopy-preempt"] if case.preempt else []
    side.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": True} for name in names],
    )
    limit = case.bandwidth or PLENTY
    side.execute(
        "migrate-set-parameters",
        max_bandwidth=PLENTY if case.postcopy else limit,
        max_postcopy_bandwidth=case.bandwidth,
    )


def _listen(destination: Machine) -> str:
    destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = destination.execute("query-migrate")["socket-address"]
    return f"tcp:{address['host']}:{address['port']}"


def _measure(case: Case, source: Machine, destination: Machine, uri: str) -> Figures:
    account.pretouch(case.memory)
    sides = {"source": source, "destination": destination}
    usage = {role: account.Usage([side.pid]) for role, side in sides.items()}
    with Sampler(destination.memory.allocated, watched=case.watched) as sampler:
        begun = time.time()
        source.execute("migrate", uri=uri)
        moving = source.wait("active")
        if case.postcopy:
            source.execute("migrate-start-postcopy")
        stopped = source.wait("STOP")
        before = source.memory.report()
        resumed = destination.wait("RESUME")
        first_step = guest.first_step(destination.memory, before)
        completed = max(side.wait("completed") for side in sides.values())
        after = destination.memory.report()
    if after.wrong:
        raise BenchError(f"the guest found wrong pages: {after}")
    ram = source.execute("query-migrate")["ram"]
    moved = ram["normal-bytes"]
    if case.postcopy:
        moving, moved = stopped, moved - ram["precopy-bytes"]
    seconds = completed - moving
    return Figures(
        contender=NAME,
        case=case.name,
        moved_bytes=moved,
        total_seconds=completed - begun,
        moving_seconds=seconds,
        latency=guest.latency(before, after, case.faulted_us)
        if case.postcopy
        else None,
        downtime_ms=(resumed - stopped) * 1000,
        processes={role: _process(sides[role], used) for role, used in usage.items()},
        allocated_at_source=source.memory.allocated(),
        allocated_at_destination=destination.memory.allocated(),
        timeline=sampler.timeline,
        faults_per_second=ram["postcopy-requests"] / seconds if case.postcopy else None,
        phases={
            "qemu": _told(source, destination),
            "guest": {"first-step": (first_step - stopped) * 1000},
        },
    )


def _process(side: Machine, used: account.Usage) -> Process:
    own, vcpus = used.end()
    return Process(
        cpu_seconds=own, vcpu_seconds=vcpus, own_bytes=account.own_bytes(side.pid)
    )


def _told(source: Machine, destination: Machine) -> dict[str, float]:
    """QEMU's own words, in milliseconds."""
    told = {**source.execute("query-migrate"), **destination.execute("query-migrate")}
    names = ("downtime", "setup-time", "postcopy-blocktime")
    return {name: float(told[name]) for name in names if name in told}
