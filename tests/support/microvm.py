"""The built-in guest program under a fake daemon.

    bench = Bench(folder / "guest")
    vm, vmm = bench.boot("--accel", "process")
    vm.until(lambda: sweeps(vmm) >= 1)
    bench.close()

`vm` is the process, `vmm` its connection to the daemon.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from support.fake_daemon import Attached, FakeDaemon
from support.ram import MIB
from support.report import Report, ReportError

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS = Path(str(resources.files("common.native"))) / "bin"
PATIENCE = 60.0  # seconds


class Microvm:
    """A running microvm; its guest's serial output comes through a pipe."""

    def __init__(self, daemon: FakeDaemon, *words: str, memory: int) -> None:
        self.process = subprocess.Popen(
            [
                *(PROGRAMS / "microvm", "--attach", daemon.path),
                *("--memory", str(memory), *words),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_line(self, pattern: str) -> re.Match[str]:
        """The next line of serial output that matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the guest ended without saying {pattern!r}")

    def wait_end(self) -> tuple[int, str]:
        """Exit status and what was said on standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something in the guest's memory, which tells nobody."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            deadline = time.monotonic() + PATIENCE
            while not condition():
                assert time.monotonic() < deadline, "it never came true"
                ended, _, _ = select.select([pidfd], [], [], 0.005)
                assert not ended, self.wait_end()
        finally:
            os.close(pidfd)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Bench:
    """A fake daemon and the programs that a test starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.daemon = FakeDaemon(path)
        self.vms: list[Microvm] = []
        self.attached: list[Attached] = []

    def run(self, *words: str, memory: int) -> Microvm:
        vm = Microvm(self.daemon, *words, memory=memory)
        self.vms.append(vm)
        return vm

    def start(self, *words: str, memory: int = 32 * MIB) -> tuple[Microvm, Attached]:
        vm = self.run(*words, memory=memory)
        return vm, self.accept()

    def boot(
        self, *words: str, memory: int = 32 * MIB, append: str = ""
    ) -> tuple[Microvm, Attached]:
        kernel = str(PROGRAMS / "test-guest.elf")
        return self.start(
            *("--kernel", kernel, "--append", append, *words), memory=memory
        )

    def accept(self) -> Attached:
        vmm = self.daemon.accept()
        self.attached.append(vmm)
        return vmm

    def close(self) -> None:
        for closing in (*self.vms, *self.attached, self.daemon):
            closing.close()


def read_report(vmm: Attached) -> Report | None:
    try:
        return vmm.report()
    except ReportError:
        return None


def sweeps(vmm: Attached) -> int:
    """How often the guest has checked all of its memory."""
    report = read_report(vmm)
    return report.sweeps if report and report.filled else 0
