"""What this host must have before a migration may come in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from common.host.memory import MEMINFO, available

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from common.guest.base import RamBlock


def memory_problem(blocks: Sequence[RamBlock], meminfo: Path = MEMINFO) -> str | None:
    """Whether the ordinary pages of these blocks fit into what is available.

    What the blocks hold already counts as available. Huge pages were reserved
    when the guest's process mapped them, and tmpfs has its own limit.
    """
    ordinary = [block for block in blocks if block.page_size == 4096]
    needed = sum(block.length for block in ordinary)
    held = sum(os.fstat(block.fd).st_blocks * 512 for block in ordinary)
    room = available(meminfo) + held
    if needed <= room:
        return None
    return (
        f"the guest has {needed >> 20} MiB of RAM and this host has"
        f" {room >> 20} MiB available; free memory, or start dstd with"
        " --overcommit if most of it is empty"
    )
