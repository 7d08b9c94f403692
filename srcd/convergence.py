"""Does precopy come to an end? Judged after every pass over the dirty bitmap."""

from __future__ import annotations

from typing import Final

# A pass that leaves nearly as much to send as it found, so often in a row: no
# hope.
HOPELESS_PASSES: Final = 3
HOPELESS_SHARE: Final = 0.9


class Convergence:
    """What the passes so far tell.

    `expected_downtime_ms` is how long sending the rest would take at the speed
    of the last pass; None before there was one.
    """

    def __init__(self) -> None:
        self.passes = 0  # begun, the last one under way
        self.dirty_pages_per_second = 0
        self.expected_downtime_ms: int | None = None
        self._stuck = 0

    def measure(
        self,
        *,
        found: int,
        sent: int,
        left: int,
        written_pages: int,
        seconds: float,
        assumed_bandwidth: int,
    ) -> None:
        """A pass is over: bytes it found, sent and left; pages the guest wrote.

        `assumed_bandwidth`, in bytes per second, takes the place of the measured
        one unless it is 0.
        """
        seconds = max(seconds, 1e-6)
        bandwidth = float(assumed_bandwidth) or max(sent, 1) / seconds
        self.dirty_pages_per_second = int(written_pages / seconds)
        self.expected_downtime_ms = int(1000 * left / bandwidth)
        self._stuck = self._stuck + 1 if left > HOPELESS_SHARE * found else 0

    def fits(self, downtime_limit_ms: int) -> bool:
        """Whether the guest can be stopped now."""
        expected = self.expected_downtime_ms
        return expected is not None and expected <= downtime_limit_ms

    @property
    def hopeful(self) -> bool:
        """False once several passes left about as much to send as they found."""
        return self._stuck < HOPELESS_PASSES
