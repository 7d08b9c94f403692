"""A daemon that cannot use what it is given ends as with a wrong command line.

systemd starts a daemon again that fails for any other reason.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio
from support import stored

UNUSABLE = 2
FAILED = 1


def ended(program: str, *words: str, folder: Path) -> tuple[int, str]:
    """Exit status and last words of a daemon that does not begin."""
    path = Path(sys.executable).with_name(program)
    done = subprocess.run(
        [str(path), "serve", "--qmp", f"{folder}/qmp", *words],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def test_complete_directory(private_dir: Path) -> None:
    directory = trio.run(stored.park, private_dir / "vm")
    status, said = ended("dstd", "--park", str(directory), folder=private_dir)
    assert status == UNUSABLE, said
    assert "a complete one: serve it, or name a new directory" in said


def test_directory_of_something_else(private_dir: Path) -> None:
    (private_dir / "vm").mkdir()
    (private_dir / "vm" / "letter").touch()
    for program, option, way in (
        ("dstd", "--park", "holds letter; name a new directory"),
        ("srcd", "--parked", "is not a parked VM"),
    ):
        status, said = ended(
            program, option, str(private_dir / "vm"), folder=private_dir
        )
        assert status == UNUSABLE, said
        assert way in said


def test_vm_that_runs_elsewhere(private_dir: Path) -> None:
    directory = trio.run(stored.park, private_dir / "vm")
    (directory / "running").write_text("tcp:there:4444")
    status, said = ended("srcd", "--parked", str(directory), folder=private_dir)
    assert status == UNUSABLE, said
    assert "serve a copy of it with --clone" in said


@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_what_may_get_better(private_dir: Path, program: str) -> None:
    status, said = ended(
        program, "--memory", "8M", "--qmp", f"{private_dir}/no/qmp", folder=private_dir
    )
    assert status == FAILED, said
    assert "No such file" in said
