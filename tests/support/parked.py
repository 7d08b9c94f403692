"""srcd and dstd with the RAM blocks of a QEMU, in files that the test maps.

The guest has no CPUs: its blocks are given to the daemon with `--ram`, under
the names that they have in QEMU's stream.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from support.ram import SharedRam

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.qemu import Qemu


@contextmanager
def shared_ram(qemu: Qemu) -> Iterator[list[SharedRam]]:
    """Blocks like those of `qemu`, all empty."""
    with ExitStack() as stack:
        rams = [SharedRam(block) for block in qemu.blocks()]
        for ram in rams:
            stack.callback(ram.close)
        yield rams


def ram_arguments(qemu: Qemu, rams: list[SharedRam]) -> list[str]:
    """Options that give a daemon these blocks as a guest without CPUs."""
    words = ["--machine", qemu.machine]
    for ram in rams:
        # The daemon opens the memfd again, under our number for it.
        words += ["--ram", f"{ram.block.name}=/proc/{os.getpid()}/fd/{ram.fd}"]
    return words


def fill(rams: list[SharedRam], seed: int) -> None:
    """Give every block a pattern of its own."""
    for number, ram in enumerate(rams):
        ram.fill(seed + number)
