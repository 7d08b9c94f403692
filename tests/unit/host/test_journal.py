"""Log lines for the journal carry their priority; others carry the program."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

from common.host import journal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


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


def fields_of(entry: bytes) -> dict[str, str]:
    found = {}
    while entry:
        name, _, rest = entry.partition(b"\n")
        (length,) = struct.unpack_from("<Q", rest)
        content, end = rest[8 : 8 + length], rest[8 + length : 9 + length]
        assert end == b"\n"
        found[name.decode()] = content.decode()
        entry = rest[9 + length :]
    return found


def record(text: str, **extra: str) -> logging.LogRecord:
    made = logging.LogRecord("n", logging.WARNING, "f", 1, text, (), None)
    vars(made).update(extra)
    return made


def test_an_entry_of_the_journal(private_dir: Path) -> None:
    """What a client of the journal can search for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(private_dir / "journal"))
        handler = journal.Journal("srcd", str(private_dir / "journal"))
        journal.begin_migration()
        handler.emit(record("a\nb", old="active", new="postcopy-active"))
        first = fields_of(sock.recv(4096))
        handler.emit(record("c"))
        second = fields_of(sock.recv(4096))
        journal.begin_migration()
        handler.emit(record("d"))
        third = fields_of(sock.recv(4096))
    migration = first.pop("POSTCOPYD_MIGRATION")
    assert first == {
        "MESSAGE": "a\nb",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "srcd",
        "POSTCOPYD_STATUS_BEFORE": "active",
        "POSTCOPYD_STATUS": "postcopy-active",
    }
    assert second["POSTCOPYD_MIGRATION"] == migration
    assert third["POSTCOPYD_MIGRATION"] != migration


def test_without_a_journal_it_is_said_aloud(
    private_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = journal.Journal("srcd", str(private_dir / "nobody"))
    handler.setFormatter(journal.Prioritized())
    handler.emit(record("a"))
    assert capsys.readouterr().err == "<4>a\n"
