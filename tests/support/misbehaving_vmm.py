"""A VMM in the test's own process that does what it should not.

    with MisbehavingVmm(path) as vmm:
        vmm.connect()
        reason = vmm.refused(blocks=[])           # one wrong hello
        vmm.attach()                              # a good one
        vmm.serve({"stop": "error text"})         # requests, in a thread

Unlike a real VMM it has no CPU: "running" is a word in its hello. Its RAM and
its userfaultfd are this process's, so touch no missing page here.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    # What a request is answered with: members of `return`, an error's text, or
    # whatever the function does.
    Behaviour = (
        dict[str, Any] | str | Callable[["MisbehavingVmm", dict[str, Any]], None]
    )

MIB = 1 << 20
PATIENCE = 60.0
_NEW_USERFAULTFD = 0xAA00
_SYS_USERFAULTFD = 323  # x86-64


class MisbehavingVmm:
    def __init__(
        self,
        path: Path,
        *,
        state: str = "running",
        length: int = 4 * MIB,
        device: tuple[str, int] = ("test", 1),
    ) -> None:
        self.path = path
        self.memfd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, length)
        self.ram = mmap.mmap(self.memfd, length)
        self._anchor = ctypes.c_char.from_buffer(self.ram)
        self.fds = {
            "userfaultfd": open_userfaultfd(),
            "pagemap": os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC),
            "block:ram": self.memfd,
        }
        self.hello: dict[str, Any] = {
            "version": 1,
            "machine": "postcopyd-1",
            "device": {"name": device[0], "version": device[1]},
            "state": state,
            "pid": os.getpid(),
            "vcpus": [],
            "blocks": [
                {
                    "idstr": "ram",
                    "length": length,
                    "page-size": 4096,
                    "base": ctypes.addressof(self._anchor),
                    "guest-address": 0,
                }
            ],
        }
        self.requests: list[str] = []
        self.told_off: str | None = None  # why the daemon had enough of it
        self._thread: threading.Thread | None = None
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    # -- the connection

    def connect(self) -> None:
        """A new connection; waits until somebody listens."""
        self.sock.close()
        deadline = time.monotonic() + PATIENCE
        while True:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                self.sock.settimeout(PATIENCE)
                self.sock.connect(str(self.path))
                return
            except OSError:
                self.sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # between two attempts to connect

    def say(self, message: object, fds: Sequence[int] = ()) -> None:
        self.say_bytes(json.dumps(message).encode(), fds)

    def say_bytes(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        socket.send_fds(self.sock, [packet], list(fds))

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        """One message; EOFError at the end of the connection."""
        packet, fds, _, _ = socket.recv_fds(self.sock, 65536, 128)
        if not packet:
            raise EOFError("the daemon has closed the connection")
        return json.loads(packet), fds

    def hear_refusal(self) -> str:
        """The reason, behind which the connection ends."""
        message, _ = self.hear()
        assert list(message) == ["refused"], message
        with suppress(ConnectionResetError):
            assert self.sock.recv(1) == b""
        return message["refused"]["reason"]

    # -- attaching

    def say_hello(self, fds: Mapping[str, int] | None = None, **changes: Any) -> None:
        """The attach message; `fds` replace or add descriptors."""
        all_fds = {**self.fds, **(fds or {})}
        members = {name.replace("_", "-"): value for name, value in changes.items()}
        hello = {**self.hello, "descriptors": list(all_fds), **members}
        self.say({"attach": hello}, list(all_fds.values()))

    def attach(self) -> None:
        self.connect()
        self.say_hello()
        message, _ = self.hear()
        assert message == {"attached": {"version": 1}}, message

    # -- requests

    def serve(self, behaviours: Mapping[str, Behaviour] | None = None) -> None:
        """Answer in a thread until the connection ends; well, unless told not to."""
        self._thread = threading.Thread(target=self._serve, args=(behaviours or {},))
        self._thread.start()

    def _serve(self, behaviours: Mapping[str, Behaviour]) -> None:
        with suppress(EOFError, OSError):
            while True:
                request, fds = self.hear()
                if "refused" in request:
                    self.told_off = request["refused"]["reason"]
                    return
                self.requests.append(request["request"])
                self._answer(request, fds, behaviours.get(request["request"], {}))

    def _answer(
        self, request: dict[str, Any], fds: list[int], behaviour: Behaviour
    ) -> None:
        for fd in fds:
            os.close(fd)
        if callable(behaviour):
            behaviour(self, request)
        elif isinstance(behaviour, str):
            self.say({"error": behaviour, "id": request["id"]})
        elif request["request"] == "save" and not behaviour:
            self.saved(request, b"state of a test")
        else:
            self.say({"return": behaviour, "id": request["id"]})

    def saved(
        self, request: dict[str, Any], state: bytes, length: int | None = None
    ) -> None:
        fd = os.memfd_create("state", os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, state, 0)
            self.give(request, fd, len(state) if length is None else length)
        finally:
            os.close(fd)

    def give(self, request: dict[str, Any], fd: int, length: int) -> None:
        """Answer `save` with this descriptor."""
        answer = {"return": {"length": length}, "id": request["id"]}
        self.say(answer | {"descriptors": ["state"]}, [fd])

    def hang_up(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def wait_hung_up(self) -> None:
        """Until the daemon has closed the connection."""
        if self._thread:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()
            self._thread = None

    def close(self) -> None:
        self.hang_up()
        self.wait_hung_up()
        self.sock.close()
        for fd in self.fds.values():
            os.close(fd)
        del self._anchor
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_userfaultfd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        fd = ctypes.CDLL(None).syscall(_SYS_USERFAULTFD, flags)
        assert fd >= 0, "userfaultfd(2) is not permitted"
        return fd
    try:
        return fcntl.ioctl(device, _NEW_USERFAULTFD, flags)
    finally:
        os.close(device)


# --- behaviours -------------------------------------------------------------------


def vanish(vmm: MisbehavingVmm, _request: dict[str, Any]) -> None:
    vmm.hang_up()


def keep_silent(_vmm: MisbehavingVmm, _request: dict[str, Any]) -> None:
    """The answer never comes."""


def answer_another(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
    vmm.say({"return": {}, "id": request["id"] + 1})


def answer_twice(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
    vmm.say({"return": {}, "id": request["id"]})
    vmm.say({"return": {}, "id": request["id"]})


def talk_nonsense(vmm: MisbehavingVmm, _request: dict[str, Any]) -> None:
    vmm.say_bytes(b"\x80nonsense")


def shut_down(vmm: MisbehavingVmm, _request: dict[str, Any]) -> None:
    vmm.say({"event": "shutdown", "data": {"reason": "the guest has crashed"}})
