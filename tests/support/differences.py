"""The differences from QEMU that are meant, as docs/qmp-differences.md has them.

A row of its tables names exchanges, what QEMU says and what the daemons say; an
asterisk stands for any text. The document is what people read, so the tests read
the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "qmp-differences.md"


@dataclass(frozen=True)
class Row:
    """One row; every column is a pattern, but the last, which is the reason."""

    subject: str
    qemu: str
    ours: str
    why: str


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is what `pattern` stands for."""
    parts = (re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(".*".join(parts), text, re.DOTALL) is not None


def rows(heading: str) -> list[Row]:
    """The rows of the table under a heading of the document."""
    section = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S
    )
    assert section, heading
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    return [_row(line) for line in lines[2:]]


def _row(line: str) -> Row:
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    subject, qemu, ours, why = cells
    return Row(_code(subject), _code(qemu), _code(ours), why)


def _code(cell: str) -> str:
    """Without the marks of code, and the backslash in front of a bar."""
    return cell.strip("`").replace("\\|", "|")
