"""The results as text: one line for each contender of each case, and the goals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cases import CASES, LIMIT, POSTCOPYD, QEMU
from metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from goals import Outcome
    from metrics import Results

Row = tuple[str, ...]
NOTHING: Final = "-"


def header() -> Row:
    units = (f"{m.name} {m.unit}".strip() for m in METRICS.values())
    return ("case", "contender", *units)


def rows(results: Results) -> list[Row]:
    """Medians of postcopyd and the others, then postcopyd by each of them."""
    lines = []
    for case in CASES:
        present = [
            contender
            for contender in (POSTCOPYD, QEMU, LIMIT)
            if results.of(case.name, contender)
        ]
        medians = {c: _medians(results, case.name, c) for c in present}
        lines += [(case.name, c, *map(number, medians[c])) for c in present]
        if POSTCOPYD in medians:
            lines += [
                (case.name, f"/ {c}", *_ratios(medians[POSTCOPYD], medians[c]))
                for c in present
                if c != POSTCOPYD
            ]
    return lines


def _medians(results: Results, case: str, contender: str) -> list[float | None]:
    return [results.median(metric, case, contender) for metric in METRICS]


def _ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[str]:
    return [
        number(a / b) if a is not None and b else NOTHING
        for a, b in zip(ours, theirs, strict=True)
    ]


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return NOTHING
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def goal_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return [
        (str(o.goal.number), o.goal.text, number(o.value), words[o.met], o.note)
        for o in outcomes
    ]


# In the order of the way: at the destination, at the source, and back again.
PHASES: Final = ("request", "queue", "send", "reply", "place", "wake")
PHASE_HEADER: Final[Row] = ("case", "phase", "mean us", "p50 us", "p90 us", "p99 us")
DOWNTIME_HEADER: Final[Row] = ("case", "part", "ms")


def phase_rows(results: Results) -> list[Row]:
    """Where the time of a fault went, as postcopyd's query-migrate has it.

    `reply` holds `queue` and `send`; what is left of it is the network, both ways,
    and the wake-ups at its ends, which nobody can time by one clock.
    """
    lines = []
    for case in CASES:
        if not results.phase(case.name, "fault: reply", "count"):
            continue
        means = {}
        for name in PHASES:
            figures = [
                results.phase(case.name, f"fault: {name}", part)
                for part in ("mean", "p50", "p90", "p99")
            ]
            means[name] = figures[0] or 0.0
            lines.append((case.name, name, *map(number, figures)))
        wire = means["reply"] - means["queue"] - means["send"]
        lines.append((case.name, "wire", number(wire), *[NOTHING] * 3))
    return lines


def downtime_rows(results: Results) -> list[Row]:
    """What the downtime was spent on, as postcopyd's query-migrate has it."""
    return [
        (case.name, part, number(results.phase(case.name, "downtime", part)))
        for case in CASES
        for part in results.parts(case.name, "downtime")
    ]


GOAL_HEADER: Final[Row] = ("", "goal", "value", "", "")


def plain(head: Row, lines: Sequence[Row], texts: int) -> str:
    """Aligned columns; the first `texts` of them to the left."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def markdown(head: Row, lines: Sequence[Row], texts: int) -> str:
    marks = [":--" if index < texts else "--:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *lines))
