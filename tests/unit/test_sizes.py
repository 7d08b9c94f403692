"""Sizes as people write them; every line was compared with QEMU 10."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import sizes
from common.sizes import MIB


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("0", 1, 0),
        ("10", 1, 10),
        ("010", MIB, 10 * MIB),
        ("10", MIB, 10 * MIB),
        ("10M", MIB, 10 * MIB),
        ("10k", MIB, 10240),
        ("10B", MIB, 10),
        ("1.5G", 1, 3 << 29),
        ("1.5", MIB, 3 * MIB // 2),
        (".5", MIB, MIB // 2),
        ("0.5k", MIB, 512),
        ("1.0", 1, 1),
        ("0x10", MIB, 16 * MIB),
        ("0x10", 1, 16),
        ("0x10B", 1, 0x10B),
        ("18446744073709551615", 1, sizes.MAX_SIZE),
        ("15E", 1, 15 << 60),
    ],
)
def test_size(text: str, unit: int, size: int) -> None:
    assert sizes.parse(text, unit) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "k", "-1", "+1", "1e3", "10KB", "10 k", " 1", "1\n", "x"),
        *("0x", "0x1k", "16E", "18446744073709551616", "1.00000001B", "1.5B"),
        *("1" * 65, "\u0661"),
    ],
)
def test_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        sizes.parse(text)


@given(st.text())
def test_any_text(text: str) -> None:
    with suppress(ValueError):
        assert 0 <= sizes.parse(text) <= sizes.MAX_SIZE


@pytest.mark.parametrize("text", ["-1", "-1k", "16E", "18446744073709551616"])
def test_out_of_range(text: str) -> None:
    with pytest.raises(sizes.OutOfRange):
        sizes.parse(text)
