"""Linux guests that are up: each kind boots once and is then read from a file."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from support.linux_guest import LinuxGuest

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Kind:
    """What has to be the same wherever a guest is to run; and a QEMU's version."""

    machine: str = "pc"
    version: str = "10"
    disk: bool = True
    arguments: tuple[str, ...] = ()

    def qemu(
        self,
        directory: Path,
        name: str,
        *,
        incoming: bool = False,
        earlier: LinuxGuest | None = None,
        more: Sequence[str] = (),
    ) -> LinuxGuest:
        """Its disk is in the directory; `more` arguments are this QEMU's alone."""
        return LinuxGuest(
            directory,
            name,
            machine=self.machine,
            version=self.version,
            disk=directory / "disk" if self.disk else None,
            incoming=incoming,
            earlier=earlier,
            arguments=[*self.arguments, *more],
        )


def start(kind: Kind, directory: Path, name: str) -> LinuxGuest:
    """A QEMU that waits for a guest which is up: give it to `run`, when it is."""
    booted = _boot(kind)
    if kind.disk:
        shutil.copyfile(_folder(kind) / "disk", directory / "disk")
    return kind.qemu(directory, name, incoming=True, earlier=booted)


def run(kind: Kind, guest: LinuxGuest) -> None:
    guest.execute("migrate-incoming", uri=f"exec:cat {_folder(kind) / 'stream'}")
    guest.wait_status("completed")


@functools.cache
def _boot(kind: Kind) -> LinuxGuest:
    """A guest of this kind, which has ended; its stream and its disk are there."""
    with kind.qemu(_folder(kind), "booted") as guest:
        guest.wait_busy()
        guest.set_parameters(max_bandwidth=0)
        guest.migrate(f"exec:cat > {_folder(kind) / 'stream'}")
        guest.wait_written()
    return guest


@functools.cache
def _folder(kind: Kind) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"booted-{kind.machine}-"))
    atexit.register(shutil.rmtree, folder)
    return folder
