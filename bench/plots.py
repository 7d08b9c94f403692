"""Two pictures of all cases: how long accesses took, and how pages arrived."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from cases import CASES, LIMIT, MIB, POSTCOPYD, QEMU
from metrics import distribution

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from figures import Figures
    from matplotlib.axes import Axes
    from metrics import Results

COLOURS: Final = {POSTCOPYD: "tab:blue", QEMU: "tab:orange", LIMIT: "tab:grey"}
COLUMNS: Final = 4
PANEL_INCHES: Final = 3.6


def draw(results: Results, directory: Path) -> None:
    """Write latency.png and pages.png."""
    _grid(
        [f for f in results.figures if f.latency], directory / "latency.png", _latency
    )
    _grid([f for f in results.figures if f.timeline], directory / "pages.png", _pages)


def _grid(
    figures: list[Figures],
    path: Path,
    panel: Callable[[Axes, str, list[Figures]], None],
) -> None:
    """A panel for each case, a colour for each contender."""
    names = [c.name for c in CASES if any(f.case == c.name for f in figures)]
    rows = max(math.ceil(len(names) / COLUMNS), 1)
    picture, axes = plt.subplots(
        rows,
        COLUMNS,
        figsize=(COLUMNS * PANEL_INCHES, rows * PANEL_INCHES),
        squeeze=False,
        layout="constrained",
    )
    for name, place in zip_longest(names, axes.flat):
        if name is None:
            place.set_axis_off()
            continue
        place.set_title(name)
        for contender, colour in COLOURS.items():
            chosen = [f for f in figures if (f.case, f.contender) == (name, contender)]
            if chosen:
                panel(place, colour, chosen)
    handles = [plt.Line2D([], [], color=c, label=n) for n, c in COLOURS.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    picture.savefig(path, dpi=100)
    plt.close(picture)


def _latency(axes: Axes, colour: str, runs: list[Figures]) -> None:
    x, y = distribution([f.latency.counts for f in runs if f.latency])
    axes.step(x, y, color=colour, where="post")
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_xlabel("access took at most, us")


def _pages(axes: Axes, colour: str, runs: list[Figures]) -> None:
    for run in runs:
        x = [seconds for seconds, _ in run.timeline]
        y = [arrived / MIB for _, arrived in run.timeline]
        axes.plot(x, y, color=colour, linewidth=1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
