"""Starts the built-in guest program and lets it attach."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from common.errors import GuestError
from common.guest.attached import accept, listening

if TYPE_CHECKING:
    from common.guest.attached import AttachedGuest

START_SECONDS: Final = 120.0  # huge pages are cleared before the program attaches


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroVm:
    """What the program is started with; `memory` in bytes.

    `kernel` None: an empty guest that waits for an incoming migration.
    """

    memory: int
    vcpus: int
    accel: str
    machine: str | None
    hugepages: str | None
    kernel: str | None
    append: str
    serial: str
    paused: bool

    def arguments(self, socket: str) -> list[str]:
        words = [
            str(program("microvm")),
            *("--attach", socket),
            *("--memory", str(self.memory)),
            *("--vcpus", str(self.vcpus)),
            *("--accel", self.accel),
            *("--serial", self.serial),
        ]
        if self.machine:
            words += ["--machine", self.machine]
        if self.hugepages:
            words += ["--hugepages", self.hugepages]
        if self.kernel is None:
            words += ["--incoming"]
        else:
            words += ["--kernel", self.kernel]
            words += ["--append", self.append] if self.append else []
        return words + (["--paused"] if self.paused else [])


def program(name: str) -> Path:
    """Where a program that is installed with this package lies."""
    return Path(str(resources.files("common.native"))) / "bin" / name


async def start(vm: MicroVm, socket: str) -> AttachedGuest:
    """Start the program and wait until it has attached.

    It gets a session of its own: it is to outlive the daemon, not to share its
    signals. GuestError with the program's own words if it ends instead.
    """
    with listening(socket) as listener:
        process = subprocess.Popen(
            vm.arguments(socket),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        guest: AttachedGuest | None = None
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            with trio.move_on_after(START_SECONDS):
                guest = await accept(listener)
            nursery.cancel_scope.cancel()
    if guest is None:
        process.kill()
        _, errors = process.communicate()
        said = errors.decode(errors="replace").strip()
        raise GuestError(
            f"the built-in guest did not start: {said or 'it says not why'}"
        )
    return guest
