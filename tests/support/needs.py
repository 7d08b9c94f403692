"""What a test may need from the machine, and how to see that it is missing.

A marker (`@pytest.mark.kvm`) names the need; conftest.py skips the test with
the sentence that the function here gives, or fails it where `.ci/setup` should
have provided the thing.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from support import hugepages, installed, linux_guest, qemu

if TYPE_CHECKING:
    from collections.abc import Callable

_KVM_CREATE_VM = 0xAE01
_USERFAULTFD_IOC_NEW = 0xAA00
_SYS_USERFAULTFD = 323  # x86-64


def missing(marker: str) -> str | None:
    """Say what is missing for tests with this marker, or None."""
    probe = _PROBES.get(marker)
    return probe() if probe else None


def provided_by_setup(marker: str) -> bool:
    """Whether it's `.ci/setup` that provides this, and not the machine."""
    return marker in ("qemu", "linux", "systemd")


@functools.cache
def _kvm() -> str | None:
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm can't be opened: {error.strerror}"
    try:
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"/dev/kvm makes no virtual machine: {error.strerror}"
    finally:
        os.close(device)
    return None


@functools.cache
def _userfaultfd() -> str | None:
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _userfaultfd_call()
    try:
        os.close(fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/userfaultfd makes no userfaultfd: {error.strerror}"
    finally:
        os.close(device)
    return None


def _userfaultfd_call() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC)
    if descriptor < 0:
        reason = os.strerror(ctypes.get_errno())
        return f"neither /dev/userfaultfd nor userfaultfd(2) is permitted: {reason}"
    os.close(descriptor)
    return None


@functools.cache
def _netns() -> str | None:
    for program in ("ip", "nft", "unshare"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"the program {program} is not installed"
    tried = subprocess.run(
        ["unshare", "--net", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    return None


def _systemd() -> str | None:
    """Its programs, and what installing without a network takes."""
    for path in (installed.SYSTEMD, installed.PYTHON):
        if not os.access(path, os.X_OK):
            return f"{path} is not there"
    if not any(installed.WHEELS.glob("trio-*.whl")):
        return "build/wheels is not there: run .ci/setup"
    return None


def _systemd_boots() -> str | None:
    """What it takes to be the first process of a machine of its own."""
    if os.geteuid():
        return "only root can give systemd namespaces of its own"
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    theirs = subprocess.run(
        [installed.PYTHON, "-V"], capture_output=True, text=True, check=False
    ).stdout
    if f"Python {ours}." not in theirs:
        return f"{installed.PYTHON} is {theirs.strip()}, the tests' is {ours}"
    command = "mount -t tmpfs none /mnt && mount -t cgroup2 none /mnt"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--cgroup", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"no control groups of its own: {tried.stderr.strip()}"
    return None


def _qemu() -> str | None:
    for version in qemu.VERSIONS:
        path = qemu.executable(version)
        if not os.access(path, os.X_OK):
            root = Path(__file__).resolve().parents[2]
            return f"{path.relative_to(root)} is not there: run .ci/qemu"
    return None


@functools.cache
def _linux() -> str | None:
    for name in ("vmlinuz", "initramfs"):
        if not (linux_guest.FOLDER / name).exists():
            return f"build/linux/{name} is not there: run .ci/linux"
    return None


_PROBES: dict[str, Callable[[], str | None]] = {
    "kvm": _kvm,
    "userfaultfd": _userfaultfd,
    "hugepages": hugepages.missing,
    "netns": _netns,
    "qemu": _qemu,
    "linux": _linux,
    "systemd": _systemd,
    "systemd_boots": _systemd_boots,
}
