"""Measures how soon a parked Linux guest runs again, in turns with QEMU.

    make bench-park
    PYTHONPATH=tests .venv/bin/python bench/park.py --runs 1 --only 256MiB

From the order to restore until the guest's first new line, and until it has
looked at all of its memory; see tests/support/restoring.py. Results go to
build/bench: park.json, park.txt, park.md; the table has medians. Guests and
their files are in memory, up to four times the guest's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import run
import table
from cases import GIB, MIB
from relay import LINKS
from support.restoring import (
    FULL,
    LAZY,
    LEARNED,
    LEARNED_PREEMPT,
    PREEMPT,
    QEMU,
    State,
    Times,
    Until,
    Way,
    learn,
    restore,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TMPFS: Final = Path("/dev/shm")
SIZES: Final = {"256MiB": 256 * MIB, "1GiB": GIB, "4GiB": 4 * GIB}
# What the guest looks at is a fifth of its memory, and lies all over it.
SCATTERED: Final = "512MiB-scattered"
SCATTERED_SIZE: Final = 512 * MIB
SCATTER: Final = 3
NAMES: Final = [*SIZES, SCATTERED]
RATE: Final = 50_000_000  # bytes per second
LAZILY: Final = (LAZY, PREEMPT)
KNOWINGLY: Final = (LEARNED, LEARNED_PREEMPT)
WHOLLY: Final = (QEMU, FULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to restore a guest of one size over one link."""

    size: str
    link: str
    """unlimited, 50MB/s (the sender's limit for what nobody asks for), or one of
    bench/relay.py, which bounds all."""
    way: Way
    once: bool = False
    """It takes so long that more runs would say no more."""
    checked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one restore came to, in milliseconds since the order."""

    size: str
    link: str
    way: str
    first_line: float
    checked: float | None
    requested: int | None

    @classmethod
    def of(cls, case: Case, times: Times) -> Figure:
        return cls(
            size=case.size,
            link=case.link,
            way=case.way.name,
            first_line=times.first_line * 1000,
            checked=None if times.checked is None else times.checked * 1000,
            requested=times.requested,
        )


def cases(size: str) -> Iterator[Case]:
    """In the order of the table."""
    small = size == "256MiB"
    if size == SCATTERED:
        for way in LAZILY + KNOWINGLY:
            yield Case(size=size, link="wide", way=way, checked=True)
        return
    for link in ("unlimited", "50MB/s"):
        for way in WHOLLY + LAZILY:
            once = link == "50MB/s" and not way.lazy
            yield Case(size=size, link=link, way=way, once=once, checked=small)
    if small:
        for way in (FULL, *LAZILY, *KNOWINGLY):
            yield Case(size=size, link="deep", way=way, once=not way.lazy)
        for way in LAZILY + KNOWINGLY:
            yield Case(size=size, link="slow", way=way)
        for way in LAZILY + KNOWINGLY:
            yield Case(size=size, link="wide", way=way, checked=True)


def main() -> int:
    wanted = arguments()
    run.OUTPUT.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    errors: list[str] = []
    with run.alone():
        for size in wanted.only:
            measure(size, wanted.runs, figures, errors)
    write(figures, errors)
    return 1 if errors or not figures else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    return parser.parse_args()


def measure(size: str, runs: int, figures: list[Figure], errors: list[str]) -> None:
    """All cases of one size, with one guest."""
    directory = Path(tempfile.mkdtemp(prefix="postcopyd-bench-", dir=TMPFS))
    try:
        state = make(size, directory)
        if any(case.way in KNOWINGLY for case in cases(size)):
            learn(state)
        for number in range(runs):
            for case in cases(size):
                if number == 0 or not case.once:
                    one(state, case, figures, errors)
    except Exception as error:  # whatever it is, other sizes still run
        errors.append(f"{size}: {error!r}")
    finally:
        shutil.rmtree(directory)


def make(size: str, directory: Path) -> State:
    if size == SCATTERED:
        return State.make(directory, SCATTERED_SIZE, scatter=SCATTER)
    return State.make(directory, SIZES[size])


def one(state: State, case: Case, figures: list[Figure], errors: list[str]) -> None:
    name = f"{case.size:16} {case.link:9} {case.way.name:14}"
    begun = time.monotonic()
    try:
        figure = Figure.of(case, restored(state, case))
    except Exception as error:  # the other cases still run
        errors.append(f"{name}: {error!r}")
        print(f"{name} FAILED: {error!r}", flush=True)
        return
    figures.append(figure)
    took = time.monotonic() - begun
    print(f"{name} {figure.first_line:7.0f} ms; {took:.1f} s in all", flush=True)


def restored(state: State, case: Case) -> Times:
    return restore(
        state,
        case.way,
        rate=RATE if case.link == "50MB/s" else 0,
        between=LINKS[case.link].to if case.link in LINKS else None,
        until=Until.CHECKED if case.checked else Until.SAYS,
    )


# -- output

HEADER: Final = ("guest", "link", "restore", "first line ms", "checked ms", "asked")


def rows(figures: Sequence[Figure]) -> list[table.Row]:
    keys = dict.fromkeys((f.size, f.link, f.way) for f in figures)
    return [row([f for f in figures if (f.size, f.link, f.way) == key]) for key in keys]


def row(same: Sequence[Figure]) -> table.Row:
    """Medians of one case."""
    checked = [f.checked for f in same if f.checked is not None]
    asked = [f.requested for f in same if f.requested is not None]
    return (
        *(same[0].size, same[0].link, same[0].way),
        table.number(statistics.median(f.first_line for f in same)),
        table.number(statistics.median(checked) if checked else None),
        f"{statistics.median(asked):.0f}" if asked else table.NOTHING,
    )


def write(figures: Sequence[Figure], errors: Sequence[str]) -> None:
    if not figures:
        return
    machine = run.machine().partition(";")[0]
    lines = rows(figures)
    for suffix, drawn in (("txt", table.plain), ("md", table.markdown)):
        text = f"{machine}; medians\n\n{drawn(HEADER, lines, texts=3)}\n"
        text += "".join(f"\nFAILED {error}\n" for error in errors)
        (run.OUTPUT / f"park.{suffix}").write_text(text)
    told = {
        "machine": machine,
        "figures": [asdict(f) for f in figures],
        "errors": list(errors),
    }
    (run.OUTPUT / "park.json").write_text(json.dumps(told))
    print((run.OUTPUT / "park.txt").read_text())


if __name__ == "__main__":
    sys.exit(main())
