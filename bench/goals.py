"""What postcopyd promises about its speed, each computed from one benchmark run.

A goal compares the median of one metric of postcopyd's with a bound, mostly a
multiple of the same metric of another contender's in the same case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cases import LIMIT, POSTCOPYD, QEMU

if TYPE_CHECKING:
    from metrics import Results

CORES_BUSY: Final = 0.9  # of all cores: the machine is the bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """`metric` of `case`, divided by what it is measured against."""

    number: int
    case: str
    metric: str
    against: str = ""
    """A contender, another case of postcopyd's, or round-trip; empty: nothing."""
    at_most: float | None = None
    at_least: float | None = None
    unless_cores_are_busy: bool = False

    @property
    def text(self) -> str:
        bound = "at most" if self.at_most is not None else "at least"
        limit = self.at_most if self.at_most is not None else self.at_least
        unit = "" if not self.against else f" x {self.against}"
        return f"{self.case}: {self.metric} {bound} {limit:.3g}{unit}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out: `value` in the goal's unit; None if it was not measured."""

    goal: Goal
    value: float | None
    met: bool | None
    note: str = ""


THIRD: Final = 1 / 3
EIGHTH: Final = 1 / 8


def _most(number: int, case: str, metric: str, bound: float, against: str = "") -> Goal:
    return Goal(number=number, case=case, metric=metric, at_most=bound, against=against)


def _least(
    number: int, case: str, metric: str, bound: float, against: str = ""
) -> Goal:
    return Goal(
        number=number, case=case, metric=metric, at_least=bound, against=against
    )


GOALS: Final = (
    # 1: a fault while the background runs at full speed
    _most(1, "preempt", "p50", THIRD, QEMU),
    _most(1, "preempt", "p50", 2, LIMIT),
    _most(1, "preempt", "p99", EIGHTH, QEMU),
    _most(1, "postcopy", "p50", 1 / 5, QEMU),
    # 2: the same when it is limited, or the link is slow and hides it
    _most(2, "limited-preempt", "p50", 1 / 2, QEMU),
    _most(2, "limited-preempt", "p99", EIGHTH, QEMU),
    _most(2, "limited", "p50", 1 / 2, QEMU),
    _most(2, "limited", "p99", EIGHTH, QEMU),
    _most(2, "slow-preempt", "p50", 3, "round-trip"),
    _most(2, "slow", "p50", 3, "round-trip"),
    # 3: throughput, and what it costs
    _least(3, "throughput", "rate", 2, QEMU),
    _least(3, "throughput", "rate", 0.75, LIMIT),
    _most(3, "throughput", "cpu-dst", THIRD, QEMU),
    _most(3, "throughput", "cpu-src", 1 / 2, QEMU),
    _least(3, "precopy-idle", "rate", 2, QEMU),
    _most(3, "untouched-12GiB", "total", 1),
    _most(3, "zero-12GiB", "total", 1),
    # 4: the switch
    _most(4, "preempt", "downtime", 1, QEMU),
    _most(4, "12GiB", "downtime", 1.5, "preempt"),
    # 5: vCPUs that fault at once
    Goal(
        number=5,
        case="faults-8",
        metric="faults",
        at_least=3,
        against=QEMU,
        unless_cores_are_busy=True,
    ),
    # 6: memory that the guest does not use
    _most(6, "half", "held", 1.05),
    _most(6, "half-zero", "held", 1.05),
    _most(6, "untouched-12GiB", "held", 1.05),
    _most(6, "zero-12GiB", "held", 1.05),
)


def outcome(goal: Goal, results: Results, cores: int) -> Outcome:
    """Compare; `cores` is how many the machine has."""
    measured = results.median(goal.metric, goal.case, POSTCOPYD)
    other = _other(goal, results)
    if measured is None or not other:
        return Outcome(goal, None, None)
    value = measured / other
    if goal.at_most is not None:
        return Outcome(goal, value, value <= goal.at_most)
    assert goal.at_least is not None
    met = value >= goal.at_least
    if met or not goal.unless_cores_are_busy:
        return Outcome(goal, value, met)
    busy = results.median("cores", goal.case, POSTCOPYD) or 0
    note = f"{busy:.2f} of {cores} cores busy"
    return Outcome(goal, value, busy >= CORES_BUSY * cores, note)


def _other(goal: Goal, results: Results) -> float | None:
    """What the goal's value is a multiple of."""
    if not goal.against:
        return 1.0
    if goal.against == "round-trip":
        seconds = results.round_trips.get("slow")
        return seconds * 1e6 if seconds else None
    if goal.against in (QEMU, LIMIT):
        return results.median(goal.metric, goal.case, goal.against)
    return results.median(goal.metric, goal.against, POSTCOPYD)
