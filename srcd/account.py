"""What a migration took: moments, bytes, the parts of the downtime."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Times:
    """Moments of one migration, in seconds of the monotonic clock; 0 is never."""

    begun: float = field(default_factory=time.monotonic)
    active: float = 0.0
    stopped: float = 0.0
    handed_over: float = 0.0
    ended: float = 0.0
    marks: list[tuple[str, float]] = field(default_factory=list)

    def mark(self, part: str) -> None:
        """A part of the downtime is over."""
        self.marks.append((part, time.monotonic()))

    def downtime_parts_ms(self) -> dict[str, float]:
        """What the downtime was spent on, in order."""
        parts = {}
        before = self.stopped
        for part, moment in self.marks:
            parts[part] = round((moment - before) * 1000, 3)
            before = moment
        return parts


@dataclass(slots=True)
class Sent:
    """Bytes on all channels at the borders between the phases."""

    precopy: int = 0
    downtime: int = 0
