#!/usr/bin/env python3
"""A complete VMM for the attach protocol, as small as it can be.

    attach_vmm.py SOCKET SIZE running|incoming

Its "CPU" is a thread with two registers, `counter` and `wrong`. Step n writes
the number n all over page 1 + n % (pages - 1), after checking that the page
still holds what it was given a round before. Page 0 shows the registers to
whoever looks at the RAM. Before it ends the program prints them.

attach_vmm.c does the same; a guest can move from one to the other.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

Message = dict[str, Any]

PAGE = 4096
DEVICE = {"name": "example", "version": 1}
REGISTERS = struct.Struct(">QQ")  # the device state: counter, wrong
SYS_USERFAULTFD = 323  # on x86-64
NEW_USERFAULTFD = 0xAA00
MADV_DONTFORK, MADV_DONTDUMP = 10, 16

# A call through ctypes lets other threads run, also while it waits for a page;
# touching an mmap object would stop the whole interpreter.
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
libc.mmap.argtypes += [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def open_userfaultfd() -> int:
    """A raw userfaultfd: the daemon does everything else with it."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        fd: int = libc.syscall(SYS_USERFAULTFD, flags)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd") from None
        return fd
    try:
        return fcntl.ioctl(device, NEW_USERFAULTFD, flags)
    finally:
        os.close(device)


class Ram:
    """One block in one sealed memfd, with one mapping."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.memfd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, length)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, seals)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self.base = libc.mmap(None, length, access, mmap.MAP_SHARED, self.memfd, 0)
        libc.madvise(self.base, length, MADV_DONTFORK)
        libc.madvise(self.base, length, MADV_DONTDUMP)
        self._page = ctypes.create_string_buffer(PAGE)

    def read(self, page: int) -> bytes:
        """May wait until the daemon has fetched the page."""
        libc.memcpy(self._page, self.base + page * PAGE, PAGE)
        return self._page.raw

    def write(self, page: int, data: bytes) -> None:
        libc.memcpy(self.base + page * PAGE, data, len(data))


class Cpu(threading.Thread):
    """The guest."""

    def __init__(self, ram: Ram) -> None:
        super().__init__(daemon=True)
        self.ram = ram
        self.counter = 0
        self.wrong = 0
        self.running = False
        self._turn = threading.Condition()
        self.start()

    def set_running(self, running: bool) -> None:
        """From the return of this call on the guest runs, or touches nothing."""
        with self._turn:
            self.running = running
            self._turn.notify()

    def run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self.running)
                page = 1 + self.counter % (self.ram.length // PAGE - 1)
            # Waiting for a page happens here, without the lock, so the guest
            # can be stopped meanwhile. After that both pages are present.
            self.ram.read(0)
            self.ram.read(page)
            with self._turn:
                if self.running:
                    self._step(page)
            time.sleep(0.0005)

    def _step(self, page: int) -> None:
        round_before = self.counter - (self.ram.length // PAGE - 1)
        if self.ram.read(page) != pattern(max(round_before + 1, 0)):
            self.wrong += 1
        self.counter += 1
        self.ram.write(page, pattern(self.counter))
        self.ram.write(0, struct.pack("<QQ", self.counter, self.wrong))


def pattern(number: int) -> bytes:
    return number.to_bytes(8, "little") * (PAGE // 8)


class Vmm:
    def __init__(self, path: str, length: int, state: str) -> None:
        self.path = path
        self.ram = Ram(length)
        self.cpu = Cpu(self.ram)
        self.state = state
        self.ended = False
        self.descriptors = {"userfaultfd": open_userfaultfd()}
        # Opened here, so that the daemon needs no right over this process.
        self.descriptors["pagemap"] = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.descriptors["block:ram"] = self.ram.memfd

    def serve(self) -> None:
        """Until `quit`: if a daemon goes away the guest runs on and waits for
        the next one at the same path."""
        while not self.ended:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                try:
                    sock.connect(self.path)
                    self.attach(sock)
                    while not self.ended:
                        self.answer(sock)
                except (ConnectionError, FileNotFoundError):
                    time.sleep(0.1)

    def attach(self, sock: socket.socket) -> None:
        block = {
            "idstr": "ram",
            "length": self.ram.length,
            "page-size": PAGE,
            "base": self.ram.base,
            "guest-address": 0,
        }
        hello = {
            "version": 1,
            "machine": "postcopyd-1",
            "device": DEVICE,
            "state": self.state,
            "pid": os.getpid(),
            "vcpus": [self.cpu.native_id],
            "blocks": [block],
            "descriptors": list(self.descriptors),
        }
        send(sock, {"attach": hello}, list(self.descriptors.values()))
        reply, _ = receive(sock)
        if "refused" in reply:
            sys.exit(f"the daemon refuses the guest: {reply['refused']['reason']}")
        if self.state == "running":
            self.cpu.set_running(True)

    def answer(self, sock: socket.socket) -> None:
        request, fds = receive(sock)
        arguments = request.get("arguments", {})
        try:
            result, out = self.do(request["request"], arguments, fds)
        except ValueError as error:
            send(sock, {"error": str(error), "id": request["id"]}, [])
            return
        answer = {"return": result, "id": request["id"]}
        send(sock, answer | ({"descriptors": ["state"]} if out else {}), out)
        for fd in out:
            os.close(fd)

    def do(
        self, name: str, arguments: Message, fds: list[int]
    ) -> tuple[Message, list[int]]:
        """Returns the answer and the descriptors that go with it."""
        if name == "save" and self.state == "paused":
            return self.save()
        elif name == "stop":
            self.cpu.set_running(False)
            self.state = "paused" if self.state == "running" else self.state
        elif name == "cont" and self.state != "incoming":
            self.cpu.set_running(True)
            self.state = "running"
        elif name == "load" and self.state == "incoming":
            self.load(arguments, *fds)
        elif name == "keep":
            self.forget(arguments["name"])
            self.descriptors["keep:" + arguments["name"]] = fds[0]
        elif name == "forget":
            self.forget(arguments["name"])
        elif name == "quit":
            self.ended = True
        else:
            raise ValueError(f"there is no {name!r} while the guest is {self.state}")
        return {}, []

    def save(self) -> tuple[Message, list[int]]:
        fd = os.memfd_create("device-state", os.MFD_CLOEXEC)
        os.write(fd, REGISTERS.pack(self.cpu.counter, self.cpu.wrong))
        return {"length": REGISTERS.size}, [fd]

    def load(self, arguments: Message, fd: int) -> None:
        device = {"name": arguments["name"], "version": arguments["version"]}
        if device != DEVICE or arguments["length"] != REGISTERS.size:
            raise ValueError(f"this is no device state of {DEVICE['name']!r}")
        self.cpu.counter, self.cpu.wrong = REGISTERS.unpack(os.pread(fd, 16, 0))
        os.close(fd)
        self.state = "paused"

    def forget(self, name: str) -> None:
        fd = self.descriptors.pop("keep:" + name, None)
        if fd is not None:
            os.close(fd)


def send(sock: socket.socket, message: Message, fds: list[int]) -> None:
    socket.send_fds(sock, [json.dumps(message).encode()], fds)


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, 65536, 128)
    if not data:
        raise ConnectionError("the daemon has gone away")
    return json.loads(data), fds


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in ("running", "incoming"):
        sys.exit("usage: attach_vmm.py SOCKET SIZE running|incoming")
    vmm = Vmm(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    vmm.serve()
    print(f"counter {vmm.cpu.counter} wrong {vmm.cpu.wrong}")
