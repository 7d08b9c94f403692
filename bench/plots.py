"""Two pictures of all cases: how long accesses took, and how pages arrived."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from cases import CASES, LIMIT, POSTCOPYD, QEMU
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
    _grid(results, directory / "latency.png", _draw_latency)
    _grid(results, directory / "pages.png", _draw_pages)


def _grid(
    results: Results, path: Path, panel: Callable[[Axes, str, list[Figures]], bool]
) -> None:
    """A panel for each case that has anything to show in it."""
    names = [case.name for case in CASES]
    wanted = [n for n in names if any(f.case == n for f in results.figures)]
    rows = max(math.ceil(len(wanted) / COLUMNS), 1)
    figure, axes = plt.subplots(
        rows,
        COLUMNS,
        figsize=(COLUMNS * PANEL_INCHES, rows * PANEL_INCHES),
        squeeze=False,
        layout="constrained",
    )
    free = list(axes.flat)
    for name in wanted:
        shown = False
        for contender, colour in COLOURS.items():
            runs = results.of(name, contender)
            shown = (runs and panel(free[0], colour, runs)) or shown
        if shown:
            free.pop(0).set_title(name)
    for left in free:
        left.set_axis_off()
    handles = [plt.Line2D([], [], color=c, label=n) for n, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_latency(axes: Axes, colour: str, runs: list[Figures]) -> bool:
    x, y = distribution([f.latency.counts for f in runs if f.latency])
    if x:
        axes.step(x, y, color=colour, where="post")
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("access took at most, us")
    return bool(x)


def _draw_pages(axes: Axes, colour: str, runs: list[Figures]) -> bool:
    for run in runs:
        x = [seconds for seconds, _ in run.timeline]
        y = [arrived / (1 << 20) for _, arrived in run.timeline]
        axes.plot(x, y, color=colour, linewidth=1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
    return any(run.timeline for run in runs)
