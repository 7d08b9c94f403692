"""Two hosts that boot a systemd each, and the link between them.

    with Bed(installed, folder) as bed:
        bed.source.systemctl("start", "srcd@web1")
        bed.link.drop()

A host is a container of systemd-nspawn: Debian's own files from build/hosts/base,
what `make install` made on top, and a file system above both that is forgotten.
Containers, mounts, interfaces and processes live in namespaces whose first
process reads its standard input: when the test run ends, in whichever way, that
input ends and nothing is left. Empty control groups are; `sweep` removes them,
also those of a test run that was killed.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosts.link import SIDES, Link

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "build" / "hosts" / "base"
SCRIPT = Path(__file__).with_name("bed.sh")
GROUPS = "postcopyd-hosts"
PATIENCE = 60.0  # seconds
DEVICES = ("kvm", "userfaultfd", "cpu_dma_latency")
OPERATIONS = ROOT / "docs" / "operations.md"


class Host:
    """One of the two; `leader` is its systemd, by our number for it."""

    def __init__(self, name: str, leader: int) -> None:
        self.name = name
        self.leader = leader

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program there, as root."""
        return subprocess.run(
            ["nsenter", "-t", str(self.leader), "--all", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def check(self, *words: str) -> str:
        """What it prints; its failure is the test's."""
        done = self.run(*words)
        assert done.returncode == 0, (self.name, words, done.stdout, done.stderr)
        return done.stdout

    def systemctl(self, *words: str) -> str:
        return self.check("systemctl", "--no-pager", *words)

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "-P", name, unit).strip()

    def wait(self, unit: str, name: str, *wanted: str) -> str:
        """Until a property of a unit begins with one of these."""
        deadline = time.monotonic() + PATIENCE
        while not (found := self.show(unit, name)).startswith(wanted):
            assert time.monotonic() < deadline, (unit, name, found, self.text(unit))
            time.sleep(0.05)  # without D-Bus nobody tells
        return found

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """The entries of a unit, as the journal keeps them."""
        lines = self.check("journalctl", "-q", "-o", "json", "-u", unit)
        return [json.loads(line) for line in lines.splitlines()]

    def text(self, unit: str) -> str:
        """The journal of a unit, for people."""
        return self.run("journalctl", "-q", "-o", "short-precise", "-u", unit).stdout

    def path(self, path: str) -> Path:
        """A path of this host, as the test can open it."""
        return Path(f"/proc/{self.leader}/root{path}")

    def write(self, path: str, text: str) -> None:
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    # --- what an operator does after `make install` ---------------------------

    def make_effective(self) -> None:
        """The document's own commands; a container has no udevd of its own."""
        for line in _after_install():
            if not line.startswith("udevadm"):
                self.check("sh", "-euc", line)
        for device in DEVICES:
            self._add(device)

    def _add(self, device: str) -> None:
        """A device as it comes, and then as udev would have it by our rules."""
        known = Path(f"/sys/class/misc/{device}/dev")
        number = os.makedev(*map(int, known.read_text().split(":")))
        # A container may make no devices, so it is done from outside.
        os.mknod(self.path(f"/dev/{device}"), 0o600 | stat.S_IFCHR, number)
        self.check("udevadm", "test", f"/sys/class/misc/{device}")


def _after_install() -> list[str]:
    """The second block of commands of the document."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", OPERATIONS.read_text(), re.M | re.S)
    assert blocks[1].startswith("systemd-sysusers"), blocks[1]
    return blocks[1].splitlines()


class Bed:
    """Both hosts, booted; `installed` is a folder with what was installed."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self._group = f"{GROUPS}-{os.getpid()}"
        self._log = folder / "log"
        state = folder / "state"
        state.mkdir()
        script = ["sh", str(SCRIPT), str(state), str(BASE), str(installed)]
        self._words = [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--net"),
            *("--uts", "--ipc", *script, self._group),
        ]

    def __enter__(self) -> Bed:
        assert os.geteuid() == 0, "only root can boot hosts"
        assert BASE.is_dir(), f"{BASE} is not there: run .ci/hosts, as root"
        sweep()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        try:
            leaders = self._wait_leaders()
            self.source, self.destination = (
                Host(side, leaders[side]) for side in SIDES
            )
            (first,) = _children(self._process.pid)
            self.link = Link(first)
            for host in self.hosts:
                self._wait_booted(host)
                host.make_effective()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "link"):
            self.link.close()
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        sweep()

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.source, self.destination

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _wait_leaders(self) -> dict[str, int]:
        deadline = time.monotonic() + PATIENCE
        while len(found := dict(self._leaders())) < len(SIDES):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)  # nobody tells of a new process
        return found

    def _leaders(self) -> Iterator[tuple[str, int]]:
        for pid in _descendants(self._process.pid):
            program, *words = _command(pid)
            for side in SIDES:
                if program == "systemd-nspawn" and f"--machine={side}" in words:
                    for child in _children(pid):
                        if _command(child)[0].endswith("/systemd"):
                            yield side, child

    def _wait_booted(self, host: Host) -> None:
        deadline = time.monotonic() + PATIENCE
        while (
            "running"
            not in (state := host.run("systemctl", "is-system-running")).stdout
        ):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, (host.name, state, self.log)
            time.sleep(0.05)  # nobody tells when systemd answers


def _children(pid: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return []


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]  # it has just ended


# --- control groups -----------------------------------------------------------

SWEEP = """
mount -t cgroup2 none /mnt
for group in /mnt/"$1"-*; do
    [ -d "$group" ] || continue
    [ -d "/proc/${group##*-}" ] && [ "${group##*-}" != "$2" ] ||
        find "$group" -depth -type d -exec rmdir {} +
done
"""


def sweep() -> None:
    """Remove the control groups of this and of dead test runs."""
    words = ["sh", "-euc", SWEEP, "sweep", GROUPS, str(os.getpid())]
    subprocess.run(["unshare", "--mount", *words], check=False, timeout=PATIENCE)
