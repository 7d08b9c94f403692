"""A guest that does nothing but touch pages, in a process of its own.

    with AttachedGuest(path, "none", rams, touch=[0x3000, 0x1000]) as guest, …:
        guest.wait_touched()

It speaks docs/attach-protocol.md and has neither vCPUs nor device state, so it
can be the destination of an empty machine of QEMU's. When it is let run it
reads one byte at each offset of its last block, in this order, and so waits
for every page that is missing. `wait_touched` returns what it got.

It outlives its daemon: it keeps what it is told to, and attaches again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from support.ram import SharedRam

SYS_USERFAULTFD = 323  # x86-64
NEW_USERFAULTFD = 0xAA00
CONNECT_SECONDS = 30.0


@dataclass(frozen=True)
class Order:
    """What the process is started with; `blocks` as the attach message has them."""

    path: str
    machine: str
    blocks: list[dict[str, Any]]
    fds: list[int]
    touch: list[int]
    state: str


class AttachedGuest:
    """The process as a test sees it. It attaches as soon as it can."""

    def __init__(
        self,
        path: Path,
        machine: str,
        rams: Sequence[SharedRam],
        touch: Sequence[int] = (),
        state: str = "incoming",
    ) -> None:
        blocks = [
            {
                "idstr": ram.block.name,
                "length": ram.block.size,
                "page-size": ram.block.page_size,
                "guest-address": 0,
            }
            for ram in rams
        ]
        fds = [ram.fd for ram in rams]
        self._order = Order(str(path), machine, blocks, fds, list(touch), state)

    def __enter__(self) -> Self:
        # By its name as a program: the process needs nothing of ours.
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(self._order))],
            stdout=subprocess.PIPE,
            pass_fds=self._order.fds,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_touched(self) -> list[int]:
        """Wait until it has read all it was to; the bytes that it found."""
        assert self.process.stdout is not None
        found: list[int] = json.loads(self.process.stdout.readline())
        return found


# --- in the process -----------------------------------------------------------

# A call through ctypes lets other threads run, also while it waits for a page.
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
libc.mmap.argtypes += [ctypes.c_long]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Guest:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.state = order.state
        self.bases = [
            _map(block["length"], fd)
            for block, fd in zip(order.blocks, order.fds, strict=True)
        ]
        self.userfaultfd = _open_userfaultfd()
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.kept: dict[str, int] = {}

    def serve(self, sock: socket.socket) -> bool:
        """Attach, and answer until the daemon goes away; False: it said `quit`."""
        self._attach(sock)
        while message := _receive(sock):
            content, fds = message
            if "request" in content:
                self._do(content["request"], content.get("arguments", {}), fds)
                _send(sock, {"return": {}, "id": content["id"]})
                if content["request"] == "quit":
                    return False
        return True

    def _do(self, request: str, arguments: dict[str, Any], fds: list[int]) -> None:
        match request:
            case "cont":
                self.state = "running"
                threading.Thread(target=self._touch, daemon=True).start()
            case "stop":
                self.state = "paused"
            case "keep":
                self._forget(arguments["name"])
                (self.kept[arguments["name"]],) = fds
            case "forget":
                self._forget(arguments["name"])

    def _forget(self, name: str) -> None:
        if (old := self.kept.pop(name, None)) is not None:
            os.close(old)

    def _attach(self, sock: socket.socket) -> None:
        blocks = [
            block | {"base": base}
            for block, base in zip(self.order.blocks, self.bases, strict=True)
        ]
        named = {"userfaultfd": self.userfaultfd, "pagemap": self.pagemap}
        for block, fd in zip(blocks, self.order.fds, strict=True):
            named[f"block:{block['idstr']}"] = fd
        named |= {f"keep:{name}": fd for name, fd in self.kept.items()}
        hello = {
            "version": 1,
            "machine": self.order.machine,
            "device": None,
            "state": self.state,
            "pid": os.getpid(),
            "vcpus": [],
            "blocks": blocks,
            "descriptors": [*named],
        }
        _send(sock, {"attach": hello}, [*named.values()])

    def _touch(self) -> None:
        byte = ctypes.create_string_buffer(1)
        found = []
        for offset in self.order.touch:
            libc.memcpy(byte, self.bases[-1] + offset, 1)
            found.append(byte.raw[0])
        print(json.dumps(found), flush=True)


def _map(length: int, fd: int) -> int:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    base: int = libc.mmap(None, length, access, mmap.MAP_SHARED, fd, 0)
    if base == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap of guest RAM")
    return base


def _open_userfaultfd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        fd = int(libc.syscall(SYS_USERFAULTFD, flags))
        if fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd") from None
        return fd
    try:
        return fcntl.ioctl(device, NEW_USERFAULTFD, flags)
    finally:
        os.close(device)


def _send(sock: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def _receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    try:
        data, fds, _, _ = socket.recv_fds(sock, 65536, 128)
    except ConnectionResetError:
        return None
    return (json.loads(data), list(fds)) if data else None


def _connect(path: str) -> socket.socket:
    """The daemon waits for its guest before it does anything else."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # between two attempts to connect


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    guest = Guest(order)
    attached = True
    while attached:
        with _connect(order.path) as sock:
            attached = guest.serve(sock)


if __name__ == "__main__":
    main()
