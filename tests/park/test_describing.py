"""`srcd describe` and a real QEMU: the command line that inspect prints is enough."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from support import qemu
from support.parking import Workshop

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]


def srcd(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["srcd", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize("version", qemu.VERSIONS)
def test_the_printed_line_starts_a_destination(private_dir: Path, version: str) -> None:
    control = private_dir / "a.qmp"
    second = f"unix:{control},server=on,wait=off"
    more = ("-name", "my vm", "-qmp", second, "-pidfile", str(private_dir / "pid"))
    with Workshop(private_dir, version=version, arguments=more) as shop:
        guest = shop.boot()
        shop.parked.mkdir()
        noted = srcd("describe", shop.parked, "--qmp", control)
        environment = _environment(guest.pid)
        assert f"process {guest.pid}" in noted.stdout
        assert noted.stderr == ""
        shop.park(guest, "precopy")

        shown = srcd("inspect", shop.parked).stdout
        assert f"  version    {'7.2' if version == '7.2' else '10.'}" in shown
        assert "  machine    pc-i440fx-" in shown
        assert "  cpus       1 of qemu64-x86_64-cpu" in shown
        assert "  name       my vm" in shown
        assert "left out: -pidfile" in shown
        assert f"working-directory: {Path.cwd()}" in shown
        assert f"LOOK AT -qmp {second}: has to be free" in shown
        assert "LOOK AT -drive" in shown

        known = json.loads(srcd("inspect", "--json", shop.parked).stdout)
        words = known["destination"]["words"]
        start = shown.index("\n\n") + 2
        printed = shown[start : shown.index("\n\n", start)]
        assert shlex.split(printed.replace("\\\n", " ")) == words
        _loads(words, environment)


def _environment(pid: int) -> dict[str, str]:
    """That of a process: where this QEMU finds its libraries."""
    content = Path(f"/proc/{pid}/environ").read_text()
    return dict(one.split("=", 1) for one in content.split("\0") if "=" in one)


def _loads(words: list[str], environment: dict[str, str]) -> None:
    """QEMU takes these words, and waits for a VM."""
    # The test's own monitor came by a descriptor, which inspect has named.
    at = words.index("-chardev")
    words = [*words[:at], *words[at + 4 :], "-qmp", "stdio"]
    asked = (
        '{"execute": "qmp_capabilities"}{"execute": "query-status"}{"execute": "quit"}'
    )
    ran = subprocess.run(
        words, input=asked, capture_output=True, text=True, timeout=30, env=environment
    )
    assert '"status": "inmigrate"' in ran.stdout, ran.stderr


def test_another_vm_is_refused(private_dir: Path) -> None:
    """And one that is parked already may still be described."""
    control = private_dir / "a.qmp"
    more = ("-qmp", f"unix:{control},server=on,wait=off")
    with Workshop(private_dir, disk=False) as shop:
        guest = shop.boot()
        shop.park(guest, "precopy")
    with Workshop(private_dir, machine="q35", disk=False, arguments=more) as other:
        other.waiting()
        ran = subprocess.run(
            ["srcd", "describe", shop.parked, "--qmp", control],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 1
        assert "that QEMU is another VM: its machine is 'pc-q35-" in ran.stderr
    with Workshop(private_dir, disk=False, arguments=more) as again:
        guest = again.waiting()
        noted = srcd("describe", shop.parked, "--qmp", control)
        assert f"process {guest.pid}" in noted.stdout
    shown = json.loads(srcd("inspect", "--json", shop.parked).stdout)
    assert shown["destination"]["words"][-2:] == ["-incoming", "defer"]
