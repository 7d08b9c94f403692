"""A note outlives its writer, whole, and has one holder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from common.errors import HostError
from common.guest.keeping import check_kept, memory_file
from common.guest.note import LENGTH, SLOT, Note


@pytest.fixture
def file():
    fd = memory_file("note", LENGTH)
    yield fd
    os.close(fd)


def again(note: Note, fd: int) -> Note:
    """As the process after this one would."""
    note.close()
    return Note(fd)


def test_empty(file):
    note = Note(file)
    assert note.read_untrusted() is None
    note.close()


def test_the_last_one_is_read(file):
    note = Note(file)
    for number in range(5):
        note.write({"number": number})
        assert note.read_untrusted() == {"number": number}
        note = again(note, file)
        assert note.read_untrusted() == {"number": number}
    note.close()


@pytest.mark.parametrize("written", [1, 15, 16, 17, 30])
def test_killed_while_it_is_written(file, written):
    """Only some bytes of the second note get into its slot."""
    note = Note(file)
    note.write({"number": 1})
    note.close()
    other = memory_file("note", LENGTH)
    os.pwrite(other, os.pread(file, LENGTH, 0), 0)
    later = Note(other)
    later.write({"number": 2, "more": "x" * 40})
    os.pwrite(file, os.pread(other, written, 0), 0)  # number 2 is in slot 0
    later.close()
    os.close(other)
    note = Note(file)
    assert note.read_untrusted() == {"number": 1}
    note.write({"number": 3})
    assert again(note, file).read_untrusted() == {"number": 3}


def test_one_holder(file):
    """Another process: locks of one process do not exclude each other here."""
    note = Note(file)
    program = "import sys; from common.guest.note import Note; Note(int(sys.argv[1]))"
    words = [sys.executable, "-c", program, str(file)]
    refused = subprocess.run(words, pass_fds=[file], capture_output=True, check=False)
    assert b"another daemon still holds this guest" in refused.stderr
    note.close()
    subprocess.run(words, pass_fds=[file], check=True)


@pytest.mark.parametrize(
    "content", [b"\xff" * LENGTH, b"\x01" + bytes(LENGTH - 1), os.urandom(LENGTH)]
)
def test_nonsense_is_no_note(file, content):
    os.pwrite(file, content, 0)
    note = Note(file)
    assert note.read_untrusted() is None
    note.close()


def test_too_short():
    fd = memory_file("note", LENGTH - 1)
    with pytest.raises(HostError, match="less than"):
        Note(fd)
    os.close(fd)


def test_too_long(file):
    note = Note(file)
    with pytest.raises(ValueError, match="a note of"):
        note.write({"text": "x" * SLOT})
    note.close()


def test_nobody_can_cut_it_off(file):
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    check_kept(file, LENGTH)
    with pytest.raises(HostError, match="expected"):
        check_kept(file, LENGTH + 1)


def test_no_room():
    """A disk that is full is told as such; what was written before stays."""
    full = os.memfd_create("note", os.MFD_ALLOW_SEALING)
    os.ftruncate(full, LENGTH)
    note = Note(full)
    note.write({"number": 1})
    fcntl.fcntl(full, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(HostError, match="cannot be written down"):
        note.write({"number": 2})
    assert again(note, full).read_untrusted() == {"number": 1}
    os.close(full)
