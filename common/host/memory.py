"""How much memory this host can still give."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MEMINFO: Final = Path("/proc/meminfo")
_KIB: Final = 1024


def available(meminfo: Path = MEMINFO) -> int:
    """Bytes that can be had without swapping: proc(5), MemAvailable."""
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * _KIB
    return 0
