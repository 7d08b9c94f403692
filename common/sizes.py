"""Sizes as QEMU reads them from people: a number and one letter."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

MAX_SIZE: Final = (1 << 64) - 1
MIB: Final = 1 << 20
_LETTERS: Final = "BKMGTPE"
_SIZE: Final = re.compile(r"(\d*(?:\.\d*)?)([BKMGTPE]?)", re.ASCII | re.IGNORECASE)
_HEX: Final = re.compile(r"0x[0-9a-f]+", re.ASCII | re.IGNORECASE)
# Longer than any number that fits, and short enough to be exact quickly.
_MAX_TEXT: Final = 64


class OutOfRange(ValueError):
    """A number, but less than nothing or more than 64 bits."""


def parse(text: str, unit: int = 1) -> int:
    """`text` in bytes; `unit` is what a number without a letter counts.

    A number is decimal, with a fraction unless it counts bytes, or hexadecimal
    and then without a letter. Raises ValueError for all else.
    """
    digits = text.removeprefix("-")
    size = _value(digits[: _MAX_TEXT + 1], unit)
    if len(text) > _MAX_TEXT or size > MAX_SIZE or digits != text:
        raise OutOfRange(f"not a size that fits 64 bits: {text[:_MAX_TEXT]!r}")
    return size


def _value(text: str, unit: int) -> int:
    if _HEX.fullmatch(text):
        return int(text, 16) * unit
    found = _SIZE.fullmatch(text)
    if not found or found[1] in ("", "."):
        raise ValueError(f"not a size: {text!r}")
    if found[2]:
        unit = 1 << 10 * _LETTERS.index(found[2].upper())
    size = Fraction(f"0{found[1]}0" if "." in found[1] else found[1]) * unit
    if unit == 1 and size.denominator != 1:
        raise ValueError(f"not a whole number of bytes: {text!r}")
    return int(size)
