"""What `make install` puts in place, and systemd's opinion of the units."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import installed
from support.programs import BIN, run

pytestmark = pytest.mark.systemd

SYSTEMD_UNITS = Path("/lib/systemd/system")
UNITS = ("srcd@vm.service", "dstd@vm.service", "postcopyd-guest@vm.service")
SOCKETS = ("srcd@vm.socket", "dstd@vm.socket")
EXPECTED = {
    *("usr/bin/srcd", "usr/bin/dstd", "usr/bin/postcopyd-microvm"),
    *("usr/lib/systemd/system/srcd@.service", "usr/lib/systemd/system/srcd@.socket"),
    *("usr/lib/systemd/system/dstd@.service", "usr/lib/systemd/system/dstd@.socket"),
    "usr/lib/systemd/system/postcopyd-guest@.service",
    "usr/lib/sysusers.d/postcopyd.conf",
    "usr/lib/tmpfiles.d/postcopyd.conf",
    "usr/lib/udev/rules.d/70-postcopyd.rules",
    "usr/share/doc/postcopyd/operations.md",
    "usr/share/doc/postcopyd/examples/dstd.toml",
}


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_installed(destination: Path) -> None:
    found = files_below(destination)
    assert found >= EXPECTED
    told = [
        path
        for path in destination.rglob("*")
        if path.is_file() and str(destination).encode() in path.read_bytes()
    ]
    assert told == []  # nobody knows where it was put together
    links = [path for path in (destination / "usr/bin").iterdir()]
    for link in links:
        assert (destination / os.readlink(link).lstrip("/")).exists(), link


def test_uninstalling_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/other").touch()
    (tmp_path / "etc/postcopyd").mkdir(parents=True)
    (tmp_path / "etc/postcopyd/vm.toml").touch()
    before = files_below(tmp_path)
    installed.make("install", tmp_path)
    assert files_below(tmp_path) >= EXPECTED
    installed.make("uninstall", tmp_path)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("target", ["install", "uninstall"])
@pytest.mark.parametrize("prefix", ["/usr/lib", "/", "lib", "."])
def test_what_is_not_ours_is_not_emptied(
    target: str, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "usr/lib/other").mkdir(parents=True)
    before = files_below(tmp_path)
    done = installed.run_make(target, tmp_path, prefix)
    assert done.returncode != 0
    assert "PREFIX must be a folder for the daemons alone" in done.stderr
    assert files_below(tmp_path) == before


def test_another_prefix(tmp_path: Path) -> None:
    installed.make("install", tmp_path, "/opt/x/postcopyd")
    assert os.readlink(tmp_path / "usr/bin/srcd") == "/opt/x/postcopyd/bin/srcd"
    installed.make("uninstall", tmp_path, "/opt/x/postcopyd")
    assert files_below(tmp_path) == set()


def test_examples_are_right(destination: Path) -> None:
    examples = destination / "usr/share/doc/postcopyd/examples"
    for program in ("srcd", "dstd"):
        done = run(BIN / program, "check-config", examples / f"{program}.toml")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unit", [*UNITS, *SOCKETS])
def test_units_are_understood(unit: str, destination: Path, tmp_path: Path) -> None:
    """It ends with status 0 whatever it finds; what it prints counts."""
    root = tmp_path / "root"
    shutil.copytree(destination, root, symlinks=True)
    # What the host has besides: its own units, and kill.
    theirs = SYSTEMD_UNITS.resolve()
    for path in theirs.iterdir():
        if path.is_file() and path.suffix in (".target", ".slice", ".mount"):
            shutil.copy(path, root / "usr/lib/systemd/system")
    (root / "bin").mkdir()
    (root / "bin/kill").write_text("#!/bin/sh\n")
    (root / "bin/kill").chmod(0o755)
    for link in (root / "usr/bin").iterdir():
        target = os.readlink(link)
        link.unlink()
        link.symlink_to(f"../..{target}")
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", unit)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("unit", ["srcd@", "dstd@", "postcopyd-guest@"])
def test_sandboxes_are_tight(unit: str, destination: Path) -> None:
    path = destination / f"usr/lib/systemd/system/{unit}.service"
    words = ["security", "--offline=true", "--threshold=20", "--no-pager"]
    done = run("systemd-analyze", *words, path)
    assert done.returncode == 0, done.stdout
