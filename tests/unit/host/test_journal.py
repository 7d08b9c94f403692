"""Log lines for the journal carry their priority; others carry the program."""

from __future__ import annotations

import logging
import os
import sys

from common.host import journal


def test_each_line_has_its_priority() -> None:
    try:
        raise ValueError("x")
    except ValueError:
        fault = sys.exc_info()
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "a\nb %d", (5,), fault)
    lines = journal.Prioritized().format(record).splitlines()
    assert lines[:2] == ["<3>a", "<3>b 5"]
    assert all(line.startswith("<3>") for line in lines)
    assert lines[-1] == "<3>ValueError: x"


def test_only_the_stream_it_speaks_of() -> None:
    reading, writing = os.pipe()
    status = os.fstat(writing)
    mine = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    assert journal.goes_to_journal(writing, mine)
    assert not journal.goes_to_journal(sys.__stderr__.fileno(), mine)
    assert not journal.goes_to_journal(writing, {})
    os.close(reading)
    os.close(writing)
