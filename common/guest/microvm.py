"""Starts the built-in guest program and lets it attach."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import trio

from common.errors import GuestError
from common.guest.attached import accept, listening

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.guest.attached import AttachedGuest

START_SECONDS: Final = 120.0  # huge pages are cleared before the program attaches
RETURN_SECONDS: Final = 10.0
MAX_WORDS: Final = 4096


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


async def start(vm: MicroVm, socket: str, nursery: trio.Nursery) -> AttachedGuest:
    """Start the program and wait until it has attached.

    It gets a session of its own: it is to outlive the daemon, not to share its
    signals. One that has outlived a daemon before us comes back instead.
    GuestError with the program's own words if it ends. Its end is noticed in
    `nursery`.
    """
    incoming = vm.kernel is None
    with (
        listening(socket) as listener,
        _lock(f"{socket}.lock") as lock,
        tempfile.TemporaryFile() as said,
    ):
        if not _is_free(lock):
            return await _come_back(listener, incoming=incoming)
        process = await trio.to_thread.run_sync(
            _spawn, vm.arguments(socket), said, lock
        )
        ended = trio.Event()
        nursery.start_soon(_reap, process, ended)
        guest = await _attached_or_ended(listener, ended, incoming=incoming)
        if guest is None:
            process.kill()
            said.seek(0)
            words = said.read(MAX_WORDS).decode(errors="replace").strip()
            raise GuestError(
                f"the built-in guest did not start: {words or 'it does not say why'}"
            )
    return guest


@contextmanager
def _lock(path: str) -> Iterator[int]:
    """A file that a guest's process holds locked for as long as it lives."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_free(lock: int) -> bool:
    """Take the lock for a new process; False: an earlier one holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _come_back(
    listener: trio.socket.SocketType, *, incoming: bool
) -> AttachedGuest:
    """The guest of a daemon before us; it looks for us many times a second."""
    with trio.move_on_after(RETURN_SECONDS):
        guest = await accept(listener, incoming=incoming)
        guest.has_outlived = True
        return guest
    raise GuestError(
        f"a built-in guest of a daemon before this one does not attach again in"
        f" {RETURN_SECONDS:.0f} s; end its process (microvm) to start anew"
    )


def _spawn(words: list[str], said: IO[bytes], lock: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,
        pass_fds=(lock,),
    )


async def _reap(process: subprocess.Popen[bytes], ended: trio.Event) -> None:
    """Wait for the program's end, so that it does not stay behind as a zombie."""
    fd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    process.wait()
    ended.set()


async def _attached_or_ended(
    listener: trio.socket.SocketType, ended: trio.Event, *, incoming: bool
) -> AttachedGuest | None:
    guest: AttachedGuest | None = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await ended.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        with trio.move_on_after(START_SECONDS):
            guest = await accept(listener, incoming=incoming)
        nursery.cancel_scope.cancel()
    return guest
