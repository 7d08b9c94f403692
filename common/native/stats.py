"""C histograms as query-migrate shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.native._native import lib

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.native import CData


def histogram(native: CData) -> Mapping[str, int]:
    """Count, mean, percentiles and maximum, in nanoseconds."""
    count = int(native.count)
    return {
        "count": count,
        "mean": int(native.sum_ns) // count if count else 0,
        "p50": int(lib.histogram_percentile(native, 500)),
        "p90": int(lib.histogram_percentile(native, 900)),
        "p99": int(lib.histogram_percentile(native, 990)),
        "max": int(native.max_ns),
    }
