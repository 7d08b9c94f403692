"""A disk that does not take what was written: the kernel says so only once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio
from support import stored

from common.store import files, manifest, receiving
from common.store.directory import Parked, Parking

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096

# strace has the kernel's word for it: EIO, the first time that RAM is synced.
_PARKING = """
import os, sys, trio
from pathlib import Path
from common.errors import HostError
from support import stored

path = Path(sys.argv[1])
lose = sys.argv[2] == "lose"

def attempt(parking):
    try:
        trio.run(parking.commit, stored.STATE, stored.TEXT, "running", "a test")
    except HostError as error:
        print(error)
    else:
        print("parked")

with stored.begin(path) as parking:
    attempt(parking)
    if lose:
        kept = os.pread(parking.fds[0], 4096, 0)
        os.pwrite(parking.fds[0], bytes(4096), 0)
        attempt(parking)
        os.pwrite(parking.fds[0], kept, 0)
    attempt(parking)
"""
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace to make fsync fail"
)


def park(tmp_path: Path, how: str) -> tuple[list[str], str]:
    """What it says, and the system calls on the first block's file."""
    program = tmp_path / "program.py"
    program.write_text(_PARKING)
    path, calls = tmp_path / "vm", tmp_path / "calls"
    ran = subprocess.run(
        [
            *("strace", "-f", "-o", calls, "-P", path / "ram-0000"),
            *("-e", "trace=fsync,pwrite64,write"),
            *("-e", "inject=fsync:error=EIO:when=1"),
            *(sys.executable, program, path, how),
        ],
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return ran.stdout.splitlines(), calls.read_text()


@needs_strace
def test_pages_are_written_again(tmp_path: Path) -> None:
    said, calls = park(tmp_path, "keep")
    assert "Input/output error" in said[0]
    assert said[1:] == ["parked"]
    _, _, after = calls.partition("(INJECTED)")
    assert "pwrite64(" in after
    assert after.index("pwrite64(") < after.index("fsync(")
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()


@needs_strace
def test_pages_that_were_lost_are_not_parked(tmp_path: Path) -> None:
    """Their checksums would be right, and they would be wrong."""
    said, _ = park(tmp_path, "lose")
    assert "Input/output error" in said[0]
    assert "pages were lost" in said[1]
    assert said[2:] == ["parked"]
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()


def test_all_data_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = files.create_sparse(path, 1 << 20)
    stored.fill(fd, 1 << 20)
    before, room = path.read_bytes(), os.fstat(fd).st_blocks
    os.utime(fd, (0, 0))
    files.write_again(fd, path)
    assert path.read_bytes() == before
    assert os.fstat(fd).st_mtime > 0
    assert os.fstat(fd).st_blocks == room, "a hole was filled"
    os.close(fd)


async def test_a_later_process_does_not_believe_them(tmp_path: Path) -> None:
    """Pages that were in doubt when their process died come again."""
    with stored.begin(tmp_path / "vm") as parking:
        os.close(parking.keep("received", PAGE))
        receiving.note(parking.path, receiving.Boot("the disk failed in it"))
    with Parking.reopen(tmp_path / "vm") as again:
        assert not again.kept
        assert not any(os.pread(again.fds[0], stored.LENGTH, 0))
        assert os.fstat(again.fds[0]).st_size == stored.LENGTH
        assert again.configuration == stored.CONFIGURATION
    with Parking.reopen(tmp_path / "vm") as again:
        os.pwrite(again.fds[0], b"page", 0)
    with Parking.reopen(tmp_path / "vm") as again:
        assert os.pread(again.fds[0], 4, 0) == b"page"
        await again.commit(stored.STATE, stored.TEXT, "running", "")
    with await trio.to_thread.run_sync(Parked.open, tmp_path / "vm") as parked:
        parked.verify()


_ONCE = """
import sys, trio
from pathlib import Path
from support import stored

trio.run(stored.park, Path(sys.argv[1]))
"""


@needs_strace
def test_all_is_on_the_disk_before_it_is_a_vm(tmp_path: Path) -> None:
    """Each file, then their names; then the manifest, and its name."""
    program = tmp_path / "program.py"
    program.write_text(_ONCE)
    path, calls = tmp_path / "vm", tmp_path / "calls"
    subprocess.run(
        [
            *("strace", "-f", "-y", "-o", calls),
            *("-e", "trace=write,pwrite64,pwritev,fsync,rename"),
            *(sys.executable, program, path),
        ],
        env={**os.environ, "PYTHONPATH": "tests"},
        check=True,
        timeout=60,
    )
    last: dict[str, str] = {}  # what was done last to each file before the rename
    lines = iter(calls.read_text().splitlines())
    for line in lines:
        if "rename(" in line and f"{path}/{manifest.NAME}" in line:
            break
        if found := re.search(rf"(\w+)\(\d+<({path}(?:/[^>]*)?)>", line):
            last[os.path.relpath(found[2], path)] = found[1]
    needed = {*manifest.FILES, f"{manifest.NAME}.new", ".", "ram-0000", "ram-0001"}
    assert {name for name, call in last.items() if call == "fsync"} >= needed
    assert any(re.search(rf"fsync\(\d+<{path}>", line) for line in lines)
