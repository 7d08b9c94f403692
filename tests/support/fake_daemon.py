"""The daemon's end of the attach protocol, without a migration behind it.

It accepts one VMM, sends it requests and hands back what it answers. Unlike a
daemon it registers nothing with the userfaultfd unless a test does, checks
little, and blocks: each call waits up to TIMEOUT_S for the VMM.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import select
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .report import REPORT_ADDRESS, REPORT_SIZE, Report

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

TIMEOUT_S = 30.0
PAGE = 4096
MESSAGE_MAX = 65_536
DESCRIPTORS_MAX = 128


class RequestFailed(Exception):
    """The VMM answered a request with an error; the text is its sentence."""


@dataclass(slots=True)
class Attached:
    """One VMM, from its attach message to the end of the connection."""

    sock: socket.socket
    message: dict[str, Any]
    descriptors: dict[str, int]
    events: list[dict[str, Any]] = field(default_factory=list)
    _last_id: int = 0
    _ram: mmap.mmap | None = None

    @property
    def ram(self) -> mmap.mmap:
        """A mapping of the guest's RAM. Reading a hole in it fills the hole."""
        if self._ram is None:
            block = self.message["blocks"][0]
            self._ram = mmap.mmap(self.descriptors["block:ram"], block["length"])
        return self._ram

    def report(self) -> Report:
        """What the test guest says about itself right now."""
        end = REPORT_ADDRESS + REPORT_SIZE
        return Report.parse(self.ram[REPORT_ADDRESS:end])

    def request(
        self, name: str, fds: dict[str, int] | None = None, /, **arguments: object
    ) -> tuple[dict[str, Any], list[int]]:
        """Send a request, wait for its answer; (return, descriptors)."""
        self._last_id += 1
        message: dict[str, Any] = {
            "request": name,
            "id": self._last_id,
            "arguments": arguments,
        }
        if fds:
            message["descriptors"] = list(fds)
        self.send(message, list(fds.values()) if fds else [])
        answer, got = self.receive()
        while "event" in answer:
            self.events.append(answer)
            answer, got = self.receive()
        assert answer["id"] == self._last_id, answer
        if "error" in answer:
            raise RequestFailed(answer["error"])
        return answer["return"], got

    def save(self) -> bytes:
        """The device state of the stopped guest."""
        answer, fds = self.request("save")
        try:
            return os.pread(fds[0], answer["length"], 0)
        finally:
            for fd in fds:
                os.close(fd)

    def load(self, state: bytes, **changes: object) -> None:
        """Load device state as from an equal VMM; `changes` to the arguments."""
        device = self.message["device"]
        arguments: dict[str, object] = {
            "name": device["name"],
            "version": device["version"],
            "length": len(state),
        }
        fd = os.memfd_create("state")
        try:
            os.pwrite(fd, state, 0)
            self.request("load", {"state": fd}, **(arguments | changes))
        finally:
            os.close(fd)

    def wait_event(self) -> dict[str, Any]:
        """The next event, also one that came while a request was answered."""
        if self.events:
            return self.events.pop(0)
        message, _ = self.receive()
        assert "event" in message, message
        return message

    def send(self, message: object, fds: list[int] | None = None) -> None:
        socket.send_fds(self.sock, [json.dumps(message).encode()], fds or [])

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, MESSAGE_MAX, DESCRIPTORS_MAX)
        if not data:
            raise EOFError("the VMM has closed the connection")
        return json.loads(data), fds

    def close(self) -> None:
        """Go away as a daemon that is killed does: without a word."""
        if self._ram is not None:
            self._ram.close()
        self.sock.close()
        for fd in self.descriptors.values():
            os.close(fd)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class FakeDaemon:
    """Listens at a path; `accept` takes the VMM that connects."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(TIMEOUT_S)
        self._listener.bind(str(path))
        self._listener.listen(1)

    def accept(self, refuse: str | None = None) -> Attached:
        """Take the next VMM in, or refuse it for the given reason."""
        sock, _ = self._listener.accept()
        sock.settimeout(TIMEOUT_S)
        vmm = Attached(sock, {}, {})
        message, fds = vmm.receive()
        vmm.message = message["attach"]
        vmm.descriptors = dict(zip(vmm.message["descriptors"], fds, strict=True))
        if refuse is not None:
            vmm.send({"refused": {"reason": refuse}})
        else:
            vmm.send({"attached": {"version": 1}})
        return vmm

    def close(self) -> None:
        self._listener.close()

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# From linux/userfaultfd.h.
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_COPY = 0xC028AA03
_UFFD_API = 0xAA
_MODE_MISSING = 1
_EVENT_PAGEFAULT = 0x12
_EVENT_SIZE = 32


class MissingPages:
    """The destination half of postcopy, one page at a time.

    From here on the guest waits at every page that is not in its RAM yet;
    `next_fault` says which it is, `place` fills it and lets the guest go on.
    """

    def __init__(self, vmm: Attached) -> None:
        block = vmm.message["blocks"][0]
        self.fd = vmm.descriptors["userfaultfd"]
        self.base = block["base"]
        self.page_size = block["page-size"]
        fcntl.ioctl(self.fd, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0))
        fcntl.ioctl(
            self.fd,
            _UFFDIO_REGISTER,
            struct.pack("QQQQ", self.base, block["length"], _MODE_MISSING, 0),
        )

    def next_fault(self) -> int:
        """The offset in RAM of the next page that somebody waits for."""
        kind, address = struct.unpack_from("B15xQ", self._next_event())
        assert kind == _EVENT_PAGEFAULT
        offset: int = (address - self.base) // self.page_size * self.page_size
        return offset

    def _next_event(self) -> bytes:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while poll.poll(TIMEOUT_S * 1000):
            # There is nothing to read if the thread was called away since.
            with contextlib.suppress(BlockingIOError):
                return os.read(self.fd, _EVENT_SIZE)
        raise TimeoutError("nobody waits for a page")

    def place(self, offset: int, data: bytes) -> None:
        """Put a page where none is; nothing if there is one already."""
        source = ctypes.create_string_buffer(data, len(data))
        copy = struct.pack(
            "QQQQq",
            self.base + offset,
            ctypes.addressof(source),
            len(data),
            0,
            0,
        )
        with contextlib.suppress(FileExistsError):
            fcntl.ioctl(self.fd, _UFFDIO_COPY, copy)
