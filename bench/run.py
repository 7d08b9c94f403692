"""Measures postcopyd, QEMU and the kernel's limit on this machine, in turns.

    make bench
    PYTHONPATH=tests .venv/bin/python bench/run.py --runs 1 --only preempt

Results go to build/bench: results.json, table.txt, table.md, latency.png,
pages.png. Every case runs `--runs` times and the table has medians. Ends with
status 1 if a migration failed; a goal that is not met is told, not an error.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import account
import goals
import limit
import plots
import postcopyd
import qemu
import table
from cases import CASES, GIB, LIMIT, MIB, POSTCOPYD, QEMU, by_name
from figures import Figures
from metrics import METRICS, Results
from relay import LINKS
from support import hugepages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cases import Case

ROOT: Final = Path(__file__).resolve().parents[1]
OUTPUT: Final = ROOT / "build" / "bench"
BUSY_LOAD: Final = 0.5
CONTENDERS: Final[dict[str, Callable[..., Figures]]] = {
    POSTCOPYD: postcopyd.run,
    QEMU: qemu.run,
    LIMIT: limit.run,
}


def main() -> int:
    wanted = arguments()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if wanted.again:
        write(read())
        return 0
    results = Results()
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        print(f"The machine is busy, load {load:.1f}: figures will be too high.")
    for name in sorted({by_name(case).link for case in wanted.only} & LINKS.keys()):
        results.round_trips[name] = LINKS[name].round_trip()
    with suppress(KeyboardInterrupt):  # what there is by then is told
        for number, case, contender in plan(wanted):
            one(results, case, contender, number)
    write(results)
    return 1 if results.errors or not results.figures else 0


def arguments() -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--contender", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument(
        "--again", action="store_true", help="draw the last results, measure nothing"
    )
    return parser.parse_args()


def plan(wanted: argparse.Namespace) -> Iterator[tuple[int, Case, str]]:
    """What runs when: contenders take turns in being first."""
    for number in range(wanted.runs):
        for case in map(by_name, wanted.only):
            taking_part = [c for c in case.contenders if c in wanted.contender]
            first = number % max(len(taking_part), 1)
            for contender in taking_part[first:] + taking_part[:first]:
                yield number, case, contender


def one(results: Results, case: Case, contender: str, number: int) -> None:
    """Make one migration; its figures or its error go into the results."""
    begun = time.monotonic()
    try:
        figures = prepared(case, CONTENDERS[contender])
    except Exception as error:  # whatever it is, the others still run
        results.errors.append(f"{case.name}, {contender}: {error!r}")
        say(number, case, contender, f"FAILED: {error!r}")
        return
    results.figures.append(figures)
    told = {name: METRICS[name].of(figures, case) for name in ("rate", "p50", "p99")}
    words = ", ".join(f"{name} {table.number(value)}" for name, value in told.items())
    say(number, case, contender, f"{words}; {time.monotonic() - begun:.1f} s in all")


def prepared(case: Case, run: Callable[..., Figures]) -> Figures:
    """Run with the memory it needs at hand, the same for each contender."""
    with ExitStack() as stack:
        stack.enter_context(alone())
        prefix = f"postcopyd-bench-{case.name}-"
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
        if case.page_size == 2 * MIB:
            pages = 2 * case.memory // case.page_size
            stack.enter_context(hugepages.reserved(pages))
            account.pretouch_pool(2 * case.memory)
        return run(case, Path(folder), LINKS.get(case.link))


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other benchmark on this machine is in a migration."""
    path = Path(tempfile.gettempdir()) / "postcopyd-bench.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(number: int, case: Case, contender: str, text: str) -> None:
    print(f"run {number + 1}: {case.name:16} {contender:9} {text}", flush=True)


# -- output


def write(results: Results) -> None:
    cores = os.cpu_count() or 1
    outcomes = [goals.outcome(goal, results, cores) for goal in goals.GOALS]
    lines, told = table.rows(results), table.goal_rows(outcomes)
    tables = {
        "txt": (table.plain, f"{machine()}\n\n", results.errors),
        "md": (table.markdown, f"{machine()}\n\n", results.errors),
    }
    for suffix, (drawn, head, errors) in tables.items():
        text = head + drawn(table.header(), lines, texts=2)
        text += "\n\n" + drawn(table.GOAL_HEADER, told, texts=2)
        text += "\n\n" + drawn(table.PHASE_HEADER, table.phase_rows(results), texts=2)
        text += "\n\n" + drawn(
            table.DOWNTIME_HEADER, table.downtime_rows(results), texts=2
        )
        text += "".join(f"\n\nFAILED {error}" for error in errors) + "\n"
        (OUTPUT / f"table.{suffix}").write_text(text)
    (OUTPUT / "results.json").write_text(json.dumps(as_json(results, outcomes)))
    plots.draw(results, OUTPUT)
    print((OUTPUT / "table.txt").read_text())
    print(f"All of it is in {OUTPUT.relative_to(ROOT)}.")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":", 1)[1] for line in lines if "model name" in line)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // GIB
    return (
        f"{os.cpu_count()} cores of{model}, {memory} GiB, Linux {platform.release()};"
        " medians; a line `/ x` is postcopyd divided by x"
    )


def as_json(results: Results, outcomes: list[goals.Outcome]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "cases": [asdict(case) for case in CASES],
        "round_trips": results.round_trips,
        "figures": [asdict(f) | {"throughput": f.throughput} for f in results.figures],
        "goals": [asdict(o) | {"text": o.goal.text} for o in outcomes],
        "errors": results.errors,
    }


def read() -> Results:
    """What the last run wrote."""
    told = json.loads((OUTPUT / "results.json").read_text())
    figures = [Figures.of(f) for f in told["figures"]]
    return Results(figures, told["errors"], told["round_trips"])


if __name__ == "__main__":
    sys.exit(main())
