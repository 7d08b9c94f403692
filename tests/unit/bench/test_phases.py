"""Where the time of a fault went, as rows; and results that are read again."""

from __future__ import annotations

from dataclasses import asdict

import table
from cases import POSTCOPYD
from figures import Figures, Latency, Process
from metrics import Results

PART = {"count": 10, "mean": 10.0, "p50": 8.0, "p90": 20.0, "p99": 50.0, "max": 60.0}


def figures(**phases: dict[str, float]) -> Figures:
    return Figures(
        contender=POSTCOPYD,
        case="preempt",
        moved_bytes=1,
        total_seconds=1.0,
        moving_seconds=1.0,
        latency=Latency(
            accesses=1, p50=1, p90=1, p99=1, mean=1, max=1, counts=[(1.0, 1)]
        ),
        processes={"source": Process(cpu_seconds=1, vcpu_seconds=0, own_bytes=1)},
        phases={name.replace("_", ": "): parts for name, parts in phases.items()},
    )


def test_the_wire_is_what_is_left_of_the_reply() -> None:
    phases = {f"fault_{name}": PART for name in table.PHASES}
    phases["fault_reply"] = PART | {"mean": 45.0}
    rows = table.phase_rows(Results([figures(**phases)]))
    assert [row[1] for row in rows] == [*table.PHASES, "wire"]
    assert rows[-1][2] == "25.0"
    assert rows[0] == ("preempt", "request", "10.0", "8.00", "20.0", "50.0")


def test_nothing_is_told_of_a_case_without_faults() -> None:
    assert table.phase_rows(Results([figures()])) == []


def test_downtime_in_its_parts() -> None:
    told = Results([figures(downtime={"stop": 1.0, "load": 7.5})])
    assert table.downtime_rows(told) == [
        ("preempt", "stop", "1.00"),
        ("preempt", "load", "7.50"),
    ]


def test_figures_that_were_written_are_read_again() -> None:
    one = figures(downtime={"stop": 1.0})
    assert Figures.of(asdict(one) | {"throughput": 3.0}) == one
