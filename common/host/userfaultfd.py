"""Whether this process may make a userfaultfd, and if not, what is in the way.

One that catches faults of the kernel too, as KVM's are: UFFD_USER_MODE_ONLY,
which needs no right, is of no use to a guest. Source: userfaultfd(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import Final

DEVICE: Final = "/dev/userfaultfd"
SYSCTL: Final = "vm.unprivileged_userfaultfd"
FIX: Final = (
    f"any one of: let this user open {DEVICE} (udev rule and group kvm, see"
    f" docs/operations.md); sysctl {SYSCTL}=1; CAP_SYS_PTRACE"
)

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
_NEW: Final = 0xAA00  # USERFAULTFD_IOC_NEW
_SYS_USERFAULTFD: Final = 323  # x86-64
_CAP_SYS_PTRACE: Final = 19
_SYSCTL_FILE: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")
_STATUS_FILE: Final = Path("/proc/self/status")


class Refused(Exception):
    """No userfaultfd is to be had; the text says what each way lacks."""


def make() -> tuple[int, str]:
    """A new userfaultfd and the way it was got; the caller closes it."""
    try:
        return _from_device(), f"through {DEVICE}"
    except OSError as error:
        device = _about_device(error)
    try:
        fd = _from_call()
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise Refused("the kernel has none, or a seccomp filter hides it") from None
        raise Refused("; ".join([device, *_about_call()])) from None
    return fd, f"through the system call: {_granted()}"


def _from_device() -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _NEW, _FLAGS)
    finally:
        os.close(device)


def _from_call() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_USERFAULTFD, _FLAGS))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


# --- what is in the way ---------------------------------------------------------


def _about_device(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no {DEVICE} (Linux 6.1, or PrivateDevices=yes hides it)"
    if error.errno == errno.EPERM:
        return f"{DEVICE} is forbidden (DeviceAllow= of the unit)"
    if error.errno == errno.EACCES:
        return f"{DEVICE} is not for this user ({_owner_and_mode()})"
    return f"{DEVICE}: {error.strerror}"


def _owner_and_mode() -> str:
    found = os.stat(DEVICE)
    return (
        f"{stat.filemode(found.st_mode)} {_name_of_user(found.st_uid)}"
        f" {_name_of_group(found.st_gid)}"
    )


def _about_call() -> list[str]:
    """Why userfaultfd(2) says no: sysctl, capability, or a filter in spite of both."""
    if _allowed_to_all() or _has_capability():
        return [f"a seccomp filter forbids the call, though {_granted()}"]
    return [f"{SYSCTL} is 0", "CAP_SYS_PTRACE is missing"]


def _granted() -> str:
    return f"{SYSCTL} is 1" if _allowed_to_all() else "CAP_SYS_PTRACE is there"


def _allowed_to_all() -> bool:
    try:
        return _SYSCTL_FILE.read_text().strip() == "1"
    except OSError:
        return False


def _has_capability() -> bool:
    for line in _STATUS_FILE.read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
    return False


def _name_of_user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _name_of_group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
