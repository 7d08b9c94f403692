"""How automatic recovery is set, and how long it waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import dstd.cli
import srcd.cli
from common.recovery import PREFIX, Policy
from common.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path


def policy(**values: int) -> Policy:
    settings = Settings()
    settings.set_parameters(
        {PREFIX + name.replace("_", "-"): value for name, value in values.items()}
    )
    return Policy.of(settings)


def test_it_is_off_unless_it_is_switched_on() -> None:
    assert not policy().auto
    assert policy(auto=True).auto


@pytest.mark.parametrize(
    ("first", "greatest", "delays"),
    [
        (1, 30, [1, 2, 4, 8, 16, 30, 30]),
        (0, 3, [0, 1, 2, 3, 3]),
        (5, 5, [5, 5, 5]),
        (60, 30, [30, 30]),
        (0, 1, [0, 1, 1]),
    ],
)
def test_delays(first: int, greatest: int, delays: list[int]) -> None:
    found = policy(first_delay=first, greatest_delay=greatest)
    assert [found.delay(n) for n in range(1, len(delays) + 1)] == delays


def test_a_late_attempt_costs_no_time() -> None:
    assert policy(greatest_delay=3600).delay(2**32) == 3600


def test_the_limit() -> None:
    assert not policy().exhausted(10**6)
    assert not policy(attempts=2).exhausted(1)
    assert policy(attempts=2).exhausted(2)


@pytest.mark.parametrize("parse", [srcd.cli.parse, dstd.cli.parse])
def test_the_table_of_the_file(tmp_path: Path, parse) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'qmp = ["q"]\nmemory = "1G"\n'
        "[parameters]\nmax-bandwidth = 5\n"
        "[recovery]\nauto = true\nattempts = 3\n"
    )
    assert parse(["serve", "--config", str(file)]).parameters == {
        "max-bandwidth": 5,
        "x-postcopyd-recovery-auto": True,
        "x-postcopyd-recovery-attempts": 3,
    }
