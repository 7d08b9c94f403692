"""An unmodified QEMU as the other end of a migration.

The machine has no CPU and no ROM, only RAM blocks in files that the test maps
(see ram.py): `none` for one block, `x-remote` with shared-memory PCI devices
for several, each of which may have its own page size. The monitor is a socket
pair made here, so there is nothing to wait for at the start. All calls block,
with a time limit; in trio run them in a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support import counting_guest
from support.ram import Block, SharedRam

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 30.0  # seconds; a test that waits longer has failed
LOOK_SECONDS = 0.001  # between two looks at what has no event
VERSIONS = ("7.2", "10")

_ENDS = ("completed", "failed", "cancelled")


class QemuError(Exception):
    """QEMU refused a command, ended, or took another way than expected."""


def executable(version: str = "10") -> Path:
    """Where `.ci/qemu` puts a QEMU."""
    root = Path(__file__).resolve().parents[2]
    return root / "build" / "qemu" / version / "qemu-system-x86_64"


class Monitor:
    """A QMP connection that keeps the events it has not been asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unread = b""
        self.events: list[dict[str, Any]] = []
        self._ordered = 0
        self._answers: dict[str, dict[str, Any]] = {}

    def negotiate(self) -> None:
        self._message(time.monotonic() + PATIENCE)
        self.execute("qmp_capabilities", enable=["oob"])

    def execute(self, command: str, /, **arguments: object) -> Any:
        """Run a command and give back what it returns.

        Underscores in argument names stand for dashes.
        """
        return self.result(self.begin(command, **arguments))

    def execute_oob(self, command: str, /, **arguments: object) -> Any:
        """Out of band: also while another command has not been answered."""
        return self.result(self.begin(command, "exec-oob", **arguments))

    def begin(self, command: str, how: str = "execute", /, **arguments: object) -> str:
        """Order it; `result` of what is returned waits for the answer."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._ordered += 1
        mark = f"{command} {self._ordered}"
        request = {how: command, "arguments": named, "id": mark}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise QemuError("QEMU ended") from None
        return mark

    def result(self, mark: str) -> Any:
        """Of the command that was begun so."""
        deadline = time.monotonic() + PATIENCE
        while mark not in self._answers:
            message = self._message(deadline)
            if "event" in message:
                self.events.append(message)
            else:
                self._answers[message["id"]] = message
        answer = self._answers.pop(mark)
        if "error" in answer:
            raise QemuError(f"{mark.split()[0]}: {answer['error']['desc']}")
        return answer["return"]

    def next_event(self, deadline: float) -> dict[str, Any]:
        """Take the oldest event; wait for one if there is none."""
        while not self.events:
            message = self._message(deadline)
            if "event" in message:
                return message
            self._answers[message["id"]] = message
        return self.events.pop(0)

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                raise QemuError("QEMU says nothing any more") from None
            except ConnectionResetError:
                received = b""
            if not received:
                raise QemuError("QEMU ended")
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


class QemuProcess:
    """A QEMU process; leaving the context ends it.

    With `incoming` it waits for `listen`. `arguments` are added to the command
    line; `ram` are the files of its memory that the test made.
    """

    def __init__(
        self,
        ram: Sequence[SharedRam] = (),
        *,
        version: str = "10",
        incoming: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        self.version = version
        self.statuses: list[str] = []
        self.ram = list(ram)
        self._incoming = ["-incoming", "defer"] if incoming else []
        self._arguments = list(arguments)

    # -- process --------------------------------------------------------

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for ram in self.ram:
                stack.callback(ram.close)
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            with theirs:
                self.process = self._start(theirs.fileno())
            stack.callback(self._end)
            self.monitor = Monitor(ours)
            self.monitor.negotiate()
            self.set_capabilities("events")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """Everything that QEMU has complained about."""
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode()

    def _start(self, monitor: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                str(executable(self.version)),
                *("-nodefaults", "-no-user-config", "-display", "none"),
                *self._machine_arguments(),
                *("-chardev", f"socket,id=monitor,fd={monitor}"),
                *("-mon", "chardev=monitor,mode=control"),
                *self._incoming,
                *self._arguments,
            ],
            pass_fds=[monitor, *(ram.fd for ram in self.ram)],
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
        )

    def _machine_arguments(self) -> list[str]:
        raise NotImplementedError

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    # -- migration ------------------------------------------------------

    def execute(self, command: str, /, **arguments: object) -> Any:
        try:
            return self.monitor.execute(command, **arguments)
        except QemuError as error:
            raise self._explained(error) from None

    def set_capabilities(self, *names: str, state: bool = True) -> None:
        changes = [{"capability": name, "state": state} for name in names]
        self.execute("migrate-set-capabilities", capabilities=changes)

    def set_parameters(self, **parameters: object) -> None:
        """Underscores in names stand for dashes."""
        self.execute("migrate-set-parameters", **parameters)

    def listen(self, uri: str = "tcp:127.0.0.1:0") -> str:
        """Listen for a migration; returns where to, with the real port."""
        self.execute("migrate-incoming", uri=uri)
        (address,) = self.execute("query-migrate")["socket-address"]
        if address["type"] == "unix":
            return f"unix:{address['path']}"
        return f"tcp:{address['host']}:{address['port']}"

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        self.execute("migrate", uri=uri, **({"resume": True} if resume else {}))

    def start_postcopy(self) -> None:
        self.execute("migrate-start-postcopy")

    def pause(self) -> None:
        self.monitor.execute_oob("migrate-pause")

    def recover(self, uri: str) -> None:
        """Listen again, as a destination whose postcopy has been cut.

        Its main thread may be waiting for a page that is to come.
        """
        self.monitor.execute_oob("migrate-recover", uri=uri)

    def counter(self, name: str) -> int:
        """One member of `ram` in the reply to query-migrate; 0 before there is any."""
        value: int = self.query().get("ram", {}).get(name, 0)
        return value

    def wait_counter(self, name: str, at_least: int) -> None:
        """Ask until a counter has come so far."""
        deadline = time.monotonic() + PATIENCE
        while (value := self.counter(name)) < at_least:
            if time.monotonic() > deadline:
                raise self._explained(QemuError(f"{name} stays at {value}"))

    def query(self) -> dict[str, Any]:
        info: dict[str, Any] = self.execute("query-migrate")
        return info

    def wait_status(self, wanted: str, patience: float = PATIENCE) -> None:
        """Wait until the migration has come to a status, seen by its events.

        Another end than the wanted one is an error at once. `statuses` keeps
        all that went by.
        """
        self.wait_event("MIGRATION", patience, status=wanted)

    def wait_written(self, patience: float = PATIENCE) -> None:
        """Wait until the stream is saved, and a command has written all of it.

        QEMU takes the migration apart only after it has said `completed`, and
        waits then for the command's end.
        """
        self.wait_status("completed", patience)
        while {"type": "migration"} in self.execute("query-yank"):
            time.sleep(LOOK_SECONDS)

    def wait_event(
        self, wanted: str, patience: float = PATIENCE, /, **data: object
    ) -> dict[str, Any]:
        """Wait for an event whose data have these members; returns the data."""
        deadline = time.monotonic() + patience
        while True:
            try:
                event = self.monitor.next_event(deadline)
            except QemuError as error:
                raise self._explained(error, f"waiting for {wanted} {data}") from None
            seen = event.get("data", {})
            if event["event"] == "MIGRATION":
                self.statuses.append(seen["status"])
            if event["event"] == wanted and data.items() <= seen.items():
                return dict(seen)
            if self._ended_otherwise(event, wanted):
                raise self._explained(
                    QemuError(f"the migration is {seen['status']}"),
                    f"{self._error_desc()}; waiting for {wanted} {data}",
                )

    def _ended_otherwise(self, event: dict[str, Any], wanted: str) -> bool:
        return (
            wanted == event["event"] == "MIGRATION" and event["data"]["status"] in _ENDS
        )

    def _error_desc(self) -> str:
        try:
            return str(self.monitor.execute("query-migrate").get("error-desc"))
        except QemuError as error:
            return str(error)  # a destination ends; stderr says why

    def _explained(self, error: QemuError, doing: str = "") -> QemuError:
        ended = self.process.poll()
        parts = [
            str(error),
            f"exit status {ended}" if ended is not None else "",
            *(doing, f"statuses {self.statuses}", self.stderr.strip()),
        ]
        return QemuError("; ".join(part for part in parts if part))


class Qemu(QemuProcess):
    """A QEMU whose memory the test maps.

    With `counting` it has a CPU that writes to RAM all the time (see
    counting_guest.py), and one more RAM block, `pc.bios`.
    """

    def __init__(
        self,
        *blocks: Block,
        version: str = "10",
        incoming: bool = False,
        counting: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(
            [SharedRam(block) for block in blocks or (Block(),)],
            version=version,
            incoming=incoming,
            arguments=arguments,
        )
        self._counting = counting

    @property
    def machine(self) -> str:
        """The machine's name, as the stream has it."""
        if self._counting:
            return "microvm"
        return "none" if len(self.ram) == 1 else "x-remote"

    def _machine_arguments(self) -> list[str]:
        first, *rest = self.ram
        arguments = ["-m", f"{first.block.size}B"]
        arguments += ["-M", f"{self.machine},memory-backend={first.block.name}"]
        if self._counting:
            firmware = counting_guest.firmware_path()
            arguments += ["-accel", "tcg", "-bios", str(firmware)]
            arguments += ["-machine", "acpi=off"]
        for ram in self.ram:
            arguments += ["-object", _backend(ram)]
        for slot, ram in enumerate(rest, start=1):
            # The master is the one that takes the memory along.
            device = f"ivshmem-plain,memdev={ram.block.name}"
            arguments += ["-device", f"{device},master=on,addr={slot:#x}"]
        return arguments

    # -- memory ---------------------------------------------------------

    def blocks(self) -> list[Block]:
        """The blocks as the stream names them, those of `ram` first."""
        blocks = [self.ram[0].block]
        for slot, ram in enumerate(self.ram[1:], start=1):
            name = f"0000:00:{slot:02x}.0/{ram.block.name}"
            blocks.append(replace(ram.block, name=name))
        if self._counting:
            blocks.append(counting_guest.FIRMWARE)
        return blocks

    def fill(self, seed: int) -> None:
        """Give every block a pattern of its own, but leave the guest its pages."""
        start = counting_guest.LAST if self._counting else 0
        for number, ram in enumerate(self.ram):
            ram.fill(seed + number, start)

    def read(self, address: int, size: int) -> bytes:
        """Read the first block as a device would: a missing page is awaited.

        QEMU's monitor stands still meanwhile.
        """
        with tempfile.NamedTemporaryFile() as file:
            self.execute("pmemsave", val=address, size=size, filename=file.name)
            return file.read()

    def wait_for_counting(self) -> None:
        """Wait until the counting guest has gone once over its pages."""
        start = counting_guest.counters(self.ram[0].bytes)
        deadline = time.monotonic() + PATIENCE
        while counting_guest.counters(self.ram[0].bytes)[-1] == start[-1]:
            if time.monotonic() > deadline:
                raise self._explained(QemuError("the guest doesn't count"))


def _backend(ram: SharedRam) -> str:
    # The path is opened by QEMU, which has the descriptor under its number.
    return (
        f"memory-backend-file,id={ram.block.name},size={ram.block.size},"
        f"mem-path=/proc/self/fd/{ram.fd},share=on"
    )
