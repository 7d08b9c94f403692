"""`make install` into a folder, and a real systemd that runs what is there.

    make("install", destination)
    with Host(destination, folder, files={"vm.toml": …}, drop_ins={}) as host:
        host.systemctl("start", "srcd@vm.service")

The host is this machine's kernel with processes, mounts and control groups of
its own: systemd is its first process, its /usr has the installed files on top,
its /etc and /run are forgotten at the end. There is no udev: the devices get
the modes that the rules would give them.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "build" / "wheels"
PYTHON = Path("/usr/bin/python3")  # one that services can see: none in a home
SYSTEMD = Path("/lib/systemd/systemd")
PATIENCE = 60.0  # seconds


def make(target: str, destination: Path, prefix: str = "") -> None:
    """Run `make install` or `make uninstall`; from wheels alone, without network."""
    done = run_make(target, destination, prefix)
    assert done.returncode == 0, done.stdout + done.stderr


def run_make(
    target: str, destination: Path, prefix: str
) -> subprocess.CompletedProcess[str]:
    # As text: meson finds its programs on the path.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHON": str(PYTHON),
        "PIP": f"{sys.executable} -m pip",
        "PIP_WHEEL": "--no-build-isolation --config-settings=build-dir=build/install"
        f" --no-index --find-links {WHEELS}",
        "WHEELS": str(WHEELS),
    }
    variables = [f"DESTDIR={destination}", f"PREFIX={prefix}"]
    # It builds in the checkout: one at a time.
    with (Path(tempfile.gettempdir()) / "postcopyd-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _run(target, variables, environment)


def _run(
    target: str, variables: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", target, *variables],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# $1: the installed files. $2: an empty folder. $3: what /etc and /run get.
BOOT = """
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs "$2"
mkdir "$2/etc" "$2/work" "$2/dev"
mount -t overlay overlay -o "lowerdir=$1/usr:/usr" /usr
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$2/etc,workdir=$2/work" /etc
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/systemd
! umount -R /sys/fs/cgroup 2>/dev/null || :
mount -t cgroup2 none /sys/fs/cgroup
systemd-sysusers /usr/lib/sysusers.d/postcopyd.conf
systemd-tmpfiles --create /usr/lib/tmpfiles.d/postcopyd.conf
for device in userfaultfd kvm cpu_dma_latency; do
    [ -e "/dev/$device" ] || continue
    own=$2/dev/$device
    mknod "$own" c $(stat -c '0x%t 0x%T' "/dev/$device")
    case $device in cpu_*) group=postcopyd ;; *) group=kvm ;; esac
    chgrp "$group" "$own"
    chmod 660 "$own"
    mount --bind "$own" "/dev/$device"
done
cp -r "$3/etc/." /etc/postcopyd
cp -r "$3/units/." /usr/lib/systemd/system/*@.service \\
    /usr/lib/systemd/system/*@.socket /run/systemd
exec env -i PATH="$PATH" container=test SYSTEMD_UNIT_PATH=/run/systemd \\
    SYSTEMD_LOG_TARGET=console \\
    "$4" --system --unit=default.target --show-status=false
"""
TARGETS = ("sysinit", "basic", "shutdown", "umount", "final", "multi-user", "default")


class Host:
    """A machine with systemd and what was installed at `destination`.

    `files` are put into /etc/postcopyd; `drop_ins` are additions to units.
    """

    def __init__(
        self,
        destination: Path,
        folder: Path,
        files: Mapping[str, str],
        drop_ins: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._log = folder / "log"
        for name, text in files.items():
            self._write(f"files/etc/{name}", text)
        for name in (*TARGETS, "network", "sockets"):
            self._write(
                f"files/units/{name}.target", "[Unit]\nDefaultDependencies=no\n"
            )
        for unit, text in drop_ins.items():
            self._write(f"files/units/{unit}.d/test.conf", text)
        for empty in ("state", "files/etc"):
            (folder / empty).mkdir(parents=True, exist_ok=True)
        self._words = [
            *("unshare", "--mount", "--pid", "--fork", "--cgroup", "--uts", "--ipc"),
            *("sh", "-euc", BOOT, "boot", str(destination), str(folder / "state")),
            *(str(folder / "files"), str(SYSTEMD)),
        ]

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def __enter__(self) -> Host:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_booted()
        return self

    def __exit__(self, *_: object) -> None:
        # Its end is the end of everything in its namespace.
        for pid in self._children():
            os.kill(pid, 9)
        self._process.wait(PATIENCE)

    def _children(self) -> list[int]:
        pid = self._process.pid
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def _wait_booted(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while "running" not in self._state():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)  # nobody tells when systemd answers

    def _state(self) -> str:
        if not self._children():
            return ""
        return self.run("systemctl", "is-system-running").stdout

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program there, as root."""
        (first,) = self._children()
        enter = ["nsenter", "-t", str(first), "-m", "-p", "-u", "-i", "-C"]
        return subprocess.run(
            [*enter, *words], capture_output=True, text=True, check=False
        )

    def systemctl(self, *words: str) -> str:
        """What it prints; its failure is the test's."""
        done = self.run("systemctl", "--no-pager", *words)
        assert done.returncode == 0, done.stdout + done.stderr + self.log
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "-P", name, unit).strip()

    def wait(self, unit: str, name: str, wanted: str) -> None:
        """Until a property begins so."""
        deadline = time.monotonic() + PATIENCE
        while not (found := self.show(unit, name)).startswith(wanted):
            assert time.monotonic() < deadline, (unit, name, found)
            time.sleep(0.05)  # without D-Bus nobody tells

    @property
    def log(self) -> str:
        """What systemd itself has said."""
        return self._log.read_text()

    def path(self, path: str) -> Path:
        """A path of this host, as the test can open it."""
        (first,) = self._children()
        return Path(f"/proc/{first}/root{path}")
