"""From figures to medians, a table and the goals."""

from __future__ import annotations

import pytest
import table
from cases import CASES, LIMIT, POSTCOPYD, QEMU, by_name
from figures import Figures, Latency, Process
from goals import GOALS, Goal, outcome
from metrics import METRICS, Results, distribution

MIB = 1 << 20
CONTENDERS = (POSTCOPYD, QEMU, LIMIT)


def figures(contender, *, case="preempt", p50=100.0, busy=1.0, **changes):
    latency = Latency(
        accesses=1000, p50=p50, p90=p50, p99=p50, mean=p50, max=p50, counts=[]
    )
    process = Process(cpu_seconds=busy, vcpu_seconds=busy, own_bytes=30 * MIB)
    values = {
        "moved_bytes": 1024 * MIB,
        "total_seconds": 2.0,
        "moving_seconds": 1.0,
        "downtime_ms": 10.0,
        "allocated_at_source": 1000 * MIB,
        "allocated_at_destination": 1010 * MIB,
        "processes": {"source": process, "destination": process},
        "latency": latency,
    }
    return Figures(contender=contender, case=case, **(values | changes))


def goal(**changes):
    values = {"number": 1, "case": "preempt", "metric": "p50"}
    return Goal(**(values | changes))


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.text)
def test_a_goal_speaks_of_what_is_measured(goal) -> None:
    assert goal.metric in METRICS
    assert (goal.at_most is None) != (goal.at_least is None)
    case = by_name(goal.case)
    assert POSTCOPYD in case.contenders
    if goal.against in CONTENDERS:
        assert goal.against in case.contenders
    elif goal.against == "round-trip":
        assert case.link == "slow"
    elif goal.against:
        assert POSTCOPYD in by_name(goal.against).contenders


def test_the_median_of_what_is_known() -> None:
    runs = [figures(QEMU, p50=p50) for p50 in (10.0, 500.0, 30.0)]
    results = Results([*runs, figures(QEMU, latency=None)])
    assert results.median("p50", "preempt", QEMU) == 30.0
    assert results.median("p50", "preempt", LIMIT) is None
    assert results.median("p50", "half", QEMU) is None


def test_metrics_have_the_units_they_say() -> None:
    one = figures(POSTCOPYD)
    values = {name: m.of(one, by_name("preempt")) for name, m in METRICS.items()}
    assert values["rate"] == pytest.approx(1073.7, abs=0.1)
    assert values["faults"] == 1000
    assert values["cpu-src"] == 1.0
    assert values["cores"] == 2.0
    assert values["own-dst"] == 30.0
    assert values["held"] == pytest.approx(1.01)


def test_memory_with_zeroes_is_not_data() -> None:
    case = by_name("half-zero")
    one = figures(POSTCOPYD, allocated_at_destination=513 * MIB)
    assert METRICS["held"].of(one, case) == pytest.approx(1.0)


def test_a_goal_against_another_contender() -> None:
    results = Results([figures(POSTCOPYD, p50=40.0), figures(QEMU, p50=100.0)])
    third = outcome(goal(at_most=1 / 3, against=QEMU), results, cores=2)
    half = outcome(goal(at_most=1 / 2, against=QEMU), results, cores=2)
    assert (third.value, third.met) == (0.4, False)
    assert half.met is True
    assert outcome(goal(at_most=2, against=LIMIT), results, cores=2).met is None


def test_a_goal_against_another_case_and_the_round_trip() -> None:
    ours = figures(POSTCOPYD, p50=40.0), figures(POSTCOPYD, case="slow", p50=6000.0)
    results = Results([*ours], round_trips={"slow": 0.002})
    other = goal(case="slow", at_most=100, against="preempt")
    assert outcome(other, results, cores=2).value == 150
    trips = goal(case="slow", at_most=3, against="round-trip")
    assert (outcome(trips, results, 2).value, outcome(trips, results, 2).met) == (
        3,
        True,
    )


@pytest.mark.parametrize(("busy", "met"), [(0.5, False), (0.95, True)])
def test_busy_cores_are_an_excuse_where_a_goal_says_so(busy, met) -> None:
    results = Results([figures(POSTCOPYD, busy=busy), figures(QEMU)])
    wanted = {"metric": "faults", "at_least": 3, "against": QEMU}
    assert outcome(goal(**wanted), results, cores=2).met is False
    excused = outcome(goal(**wanted, unless_cores_are_busy=True), results, cores=2)
    assert excused.met is met
    assert f"{2 * busy:.2f} of 2 cores busy" in excused.note


def test_the_table_has_ratios() -> None:
    results = Results([figures(POSTCOPYD, p50=40.0), figures(QEMU, p50=100.0)])
    lines = table.rows(results)
    assert [line[:2] for line in lines] == [
        ("preempt", "postcopyd"),
        ("preempt", "qemu"),
        ("preempt", "/ qemu"),
    ]
    column = table.header().index("p50 us")
    assert [line[column] for line in lines] == ["40.0", "100", "0.40"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.123, "0.12"), (12.34, "12.3"), (1234567.8, "1234568")],
)
def test_numbers_have_three_digits(value, text) -> None:
    assert table.number(value) == text


def test_columns_are_aligned() -> None:
    text = table.plain(("case", "us"), [("a", "1000"), ("bcdef", "1")], texts=1)
    assert text.splitlines() == ["case     us", "a      1000", "bcdef     1"]
    marked = table.markdown(("case", "us"), [("a", "1")], texts=1)
    assert marked.splitlines() == ["| case | us |", "| :-- | --: |", "| a | 1 |"]


def test_histograms_of_several_runs_are_one_distribution() -> None:
    x, y = distribution([[(10.0, 1), (30.0, 2)], [(20.0, 1)]])
    assert x == [10.0, 20.0, 30.0]
    assert y == [0.25, 0.5, 1.0]
    assert distribution([]) == ([], [])
