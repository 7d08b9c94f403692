"""The thread of a QEMU that reads the preempt channel."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from support.qemu import PATIENCE

if TYPE_CHECKING:
    from support.qemu import QemuProcess

NAMED_THREADS: Final = ("-name", "debug-threads=on")
"""What a QEMU needs whose thread is to be found."""
# QEMU's, of each version.
_NAMES: Final = ("mig/dst/preempt", "fault-fast")
# On x86-64.
_RECVMSG: Final = "47"


def wait_reads_preempt(qemu: QemuProcess) -> None:
    """Until the thread for it waits for what comes on the preempt channel.

    A QEMU that loses its connection sooner crashes: it closes the channel, and
    the thread, which has just been told to go on, reads from none at all.
    """
    (thread,) = [
        task
        for task in Path(f"/proc/{qemu.pid}/task").iterdir()
        if (task / "comm").read_text().strip() in _NAMES
    ]
    deadline = time.monotonic() + PATIENCE
    while (thread / "syscall").read_text().split()[0] != _RECVMSG:
        assert time.monotonic() < deadline, qemu.stderr
