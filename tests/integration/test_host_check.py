"""`check` and `check-config`: can this host migrate, and is this file right?

docs/operations.md explains both; its files and its tables are checked here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.programs import BIN, run

if TYPE_CHECKING:
    import subprocess

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.userfaultfd
@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_this_machine_can(program: str) -> None:
    done = run(BIN / program, "check")
    assert done.returncode == 0, done.stdout
    assert "OK    userfaultfd: permitted through " in done.stdout
    assert "0 FAIL" in done.stdout.splitlines()[-1]


# No capability at all, and in place of each device one that nobody may open.
BARE = """
mount -t tmpfs tmpfs "$1"
for device in userfaultfd kvm cpu_dma_latency; do
    mknod "$1/$device" c 10 1
    chmod 0 "$1/$device"
    [ ! -e "/dev/$device" ] || mount --bind "$1/$device" "/dev/$device"
done
shift
exec setpriv --bounding-set=-all --inh-caps=-all "$@"
"""


def bare(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run("unshare", "--mount", "sh", "-euc", BARE, "sh", folder, *words)


@pytest.mark.netns
@pytest.mark.userfaultfd
def test_rights_taken_away(private_dir: Path) -> None:
    done = bare(private_dir, BIN / "dstd", "check")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (line,) = [one for one in lines if " userfaultfd: " in one]
    assert line.startswith("FAIL  userfaultfd: not permitted, and postcopy needs it: ")
    if Path("/dev/userfaultfd").exists():
        assert "/dev/userfaultfd is not for this user (c--------- root root)" in line
    assert "vm.unprivileged_userfaultfd is 0; CAP_SYS_PTRACE is missing; " in line
    assert "any one of: let this user open /dev/userfaultfd" in line
    assert any(one.startswith("WARN  /dev/kvm: ") for one in lines)
    assert any(one.startswith("WARN  processors stay awake: ") for one in lines)
    assert lines[-1] == "this host cannot take guests in: 1 FAIL, 2 WARN"


@pytest.mark.netns
@pytest.mark.userfaultfd
def test_a_source_without_rights_is_only_slow(private_dir: Path) -> None:
    done = bare(private_dir, BIN / "srcd", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN  userfaultfd: not permitted, and without it every page" in done.stdout


@pytest.mark.netns
def test_no_devices_at_all(private_dir: Path) -> None:
    """As PrivateDevices=yes has it; the capability helps."""
    script = 'mount -t tmpfs tmpfs /dev; exec "$@"'
    done = run("unshare", "--mount", "sh", "-euc", script, "sh", BIN / "dstd", "check")
    assert "OK    userfaultfd: permitted through the system call: " in done.stdout
    assert "WARN  /dev/kvm: No such file or directory; " in done.stdout


def test_a_configuration_that_asks_too_much(private_dir: Path) -> None:
    config = private_dir / "c.toml"
    config.write_text('memory = "1000000G"\n')
    assert run(BIN / "dstd", "check-config", config).stdout == f"{config}: OK\n"
    done = run(BIN / "dstd", "check", "--config", config)
    assert done.returncode == 1
    assert "FAIL  memory: " in done.stdout
    assert "; free memory, or move a smaller guest" in done.stdout


def test_a_configuration_that_is_wrong(private_dir: Path) -> None:
    config = private_dir / "c.toml"
    config.write_text('memmory = "1G"\n')
    done = run(BIN / "dstd", "check-config", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{config}: Parameter 'memmory' is unexpected; did you mean" in done.stderr


@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_files_of_the_document_are_right(program: str, private_dir: Path) -> None:
    shown = re.findall(r"^```toml\n(.*?)^```$", OPERATIONS, re.M | re.S)
    path = private_dir / "c.toml"
    path.write_text(dict(zip(("srcd", "dstd"), shown, strict=True))[program])
    done = run(BIN / program, "check-config", path)
    assert done.returncode == 0, done.stderr


def test_the_document_explains_what_check_says() -> None:
    told = re.findall(r"^\| `([^`]+)` \|", OPERATIONS, re.M)
    for program in ("srcd", "dstd"):
        lines = run(BIN / program, "check").stdout.splitlines()[:-1]
        needs = [line[6:].partition(": ")[0] for line in lines]
        assert len(needs) > 5
        for need in needs:
            words = (need, f"{need.partition(' (')[0]} (…)")
            assert any(word in told for word in words), need
