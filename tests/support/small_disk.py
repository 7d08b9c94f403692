"""A program on a file system that has hardly any room."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def _can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(
    not _can_mount(), reason="needs a mount namespace of its own"
)


def in_small_disk(folder: Path, kilobytes: int, program: Path, *words: Path) -> str:
    """What a Python program prints whose last argument is a disk of that size."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={kilobytes}k none {disk} && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable]
    ran = subprocess.run(
        [*command, program, *words, disk],
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
