"""The numbers in docs/wire-format.md are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.stream import constants as c

DOCUMENT = Path(__file__).parents[3] / "docs" / "wire-format.md"
TEXT = DOCUMENT.read_text("utf-8")
LIMITS = {name: value for name, value in vars(c).items() if name.startswith("MAX_")}
NOT_READ = {"MAX_DISCARDS_PER_COMMAND"}  # of what we write, not of what we read


def test_every_limit_is_documented():
    rows = re.findall(r"^\| `(MAX_\w+)` \| (\d+) \|", TEXT, re.MULTILINE)
    assert {name: int(value) for name, value in rows} == {
        name: value for name, value in LIMITS.items() if name not in NOT_READ
    }


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("PING HELLO", c.PING_HELLO),
        ("PONG HELLO_ACK", c.PONG_HELLO_ACK),
        ("PING SETUP", c.PING_SETUP),
        ("PING COMMIT", c.PING_COMMIT),
        ("PING COMPLETED", c.PING_COMPLETED),
    ],
)
def test_our_own_values_are_documented(word, value):
    assert f"| {value:#x} | {word} |" in TEXT


def test_the_numbers_of_migrations_are_documented():
    last = c.PING_MIGRATION + c.MIGRATIONS - 1
    assert f"| {c.PING_MIGRATION:#x} to {last:#x} | PING MIGRATION |" in TEXT
    others = {value for name, value in vars(c).items() if name.startswith("PING_")}
    assert not others & set(range(c.PING_MIGRATION + 1, last + 1))


def test_failure_is_documented():
    assert f"| {c.RP_X_FAILURE:#x} | FAILURE |" in TEXT


def test_our_own_values_are_none_of_qemus():
    ours = {
        *(c.PING_HELLO, c.PONG_HELLO_ACK, c.PING_SETUP, c.PING_COMMIT),
        c.PING_COMPLETED,
    }
    qemus = {
        c.PING_FIRST,
        c.PING_DISCARDED,
        c.PING_LOADED,
        c.PING_LISTENING,
        c.QEMU_VM_PING_PACKAGED_LOADED,
    }
    assert len(ours) == 5
    assert not ours & qemus
