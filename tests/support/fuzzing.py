"""What every fuzzer in Python does: executions until time is up, or one fails."""

from __future__ import annotations

import argparse
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def main(description: str, survives: Callable[[random.Random], bool]) -> int:
    """Read `--seconds` and `--seed` and fuzz for so long; returns the exit status.

    `survives` is one execution: it takes all that it leaves to chance from the
    dice it gets, so that equal seeds give equal inputs, and it returns False,
    with a reproducer printed, if a promise was broken.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    return _run(survives, arguments.seconds, arguments.seed)


def _run(survives: Callable[[random.Random], bool], seconds: float, seed: int) -> int:
    dice = random.Random(seed)
    end = time.monotonic() + seconds
    executions = 0
    while time.monotonic() < end:
        executions += 1
        if not survives(dice):
            print(f"failed after {executions} executions, seed {seed}")
            return 1
    print(f"{executions} executions, seed {seed}")
    return 0
