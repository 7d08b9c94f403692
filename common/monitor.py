"""What both daemons answer on the control socket besides migration itself.

Run state, settings, identity, memory, the end. A daemon adds its own commands
to `handlers` and gives the whole table to the server.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

from common import address
from common.descriptors import Descriptors
from common.guest.base import GuestState
from common.qmp.session import CommandError
from common.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.guest.base import Guest, RamBlock
    from common.qmp.message import Json
    from common.qmp.server import Handler
    from common.status import MigrationStatus

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
SAVE_CHUNK: Final = 1 << 20


class Monitor:
    """The state of one daemon that QMP shows, and the commands on it.

    `emit` sends an event to all clients; `close` begins the end of the server,
    and `before_end` is called in between; `take_descriptor` is the server's.
    `run_state` uses QEMU's words (RunState).
    """

    def __init__(self, guest: Guest, name: str | None, run_state: str) -> None:
        self.guest = guest
        self.name = name
        self.run_state = run_state
        self.settings = Settings()
        self.descriptors = Descriptors()
        self.quitting = trio.Event()
        self.emit: Callable[[str, Mapping[str, Json] | None], None] = _nobody
        self.close: Callable[[], None] = lambda: None
        self.take_descriptor: Callable[[], int | None] = lambda: None
        self.before_end: Callable[[], object] = lambda: None
        self.memory_problem: Callable[[], str | None] = lambda: None
        self.in_postcopy: Callable[[], bool] = lambda: False
        self.way_on: Callable[[], str] = str
        """What to do when the daemon has ended in postcopy."""
        self.guest_stays = False
        """The daemon ends and its guest's process must not: see `shut_down`."""

    @property
    def handlers(self) -> dict[str, Handler]:
        return {
            "query-name": self._query_name,
            "query-uuid": self._query_uuid,
            "query-status": self._query_status,
            "query-migrate-capabilities": self._query_capabilities,
            "migrate-set-capabilities": self._set_capabilities,
            "query-migrate-parameters": self._query_parameters,
            "migrate-set-parameters": self._set_parameters,
            "migrate_set_parameter": self._set_parameter,
            "getfd": self._getfd,
            "closefd": self._closefd,
            "pmemsave": self._pmemsave,
            "quit": self._quit,
        }

    def set_run_state(self, run_state: str) -> None:
        self.run_state = run_state

    def announce(self, old: MigrationStatus, new: MigrationStatus) -> None:
        """A status listener: the MIGRATION event, if it is wanted."""
        if self.settings.on("events"):
            self.emit("MIGRATION", {"status": new})

    async def stop_guest(self) -> None:
        await self.guest.stop()
        self.run_state = "paused"
        self.emit("STOP", None)

    async def continue_guest(self) -> None:
        await self.guest.cont()
        self.run_state = "running"
        self.emit("RESUME", None)

    def shut_down(self, reason: str) -> None:
        """Say that this is the end, once.

        In the middle of postcopy the guest is on both hosts. Then only who says
        `quit` ends it; after a signal the next daemon goes on with it.
        """
        if not self.quitting.is_set():
            self.guest_stays = self.in_postcopy() and reason == "host-signal"
            self.emit("SHUTDOWN", {"guest": False, "reason": reason})
            self.before_end()
            self.close()
            self.quitting.set()

    def target(
        self, arguments: Mapping[str, Json], *, incoming: bool = False
    ) -> address.Address:
        """The address in a command's arguments, if the settings allow to use it."""
        try:
            target = address.of_arguments(arguments, incoming=incoming)
        except address.AddressError as error:
            raise CommandError(str(error)) from None
        if self.settings.on("postcopy-preempt") and not address.takes_many(target):
            raise CommandError("Migration requires multi-channel URIs (e.g. tcp)")
        if self.settings.text("tls-creds"):
            raise CommandError(
                "TLS is not supported and tls-creds is set; set it to an empty string"
                " to send the guest unencrypted"
            )
        return target

    # -- commands

    async def _query_name(self, _: Mapping[str, Json]) -> Json:
        return {"name": self.name} if self.name else {}

    async def _query_uuid(self, _: Mapping[str, Json]) -> Json:
        return {"UUID": NO_UUID}

    async def _query_status(self, _: Mapping[str, Json]) -> Json:
        return {"status": self.run_state, "running": self.run_state == "running"}

    async def _query_capabilities(self, _: Mapping[str, Json]) -> Json:
        return self.settings.capabilities()

    async def _set_capabilities(self, arguments: Mapping[str, Json]) -> Json:
        wanted = arguments["capabilities"]
        assert isinstance(wanted, list)
        self.settings.set_capabilities(wanted)
        return None

    async def _query_parameters(self, _: Mapping[str, Json]) -> Json:
        return self.settings.parameters()

    async def _set_parameters(self, arguments: Mapping[str, Json]) -> Json:
        self.settings.set_parameters(arguments)
        return None

    async def _set_parameter(self, arguments: Mapping[str, Json]) -> Json:
        """One by name, or the form of migrate-set-parameters."""
        if "parameter" not in arguments:
            return await self._set_parameters(arguments)
        name = str(arguments["parameter"])
        self.settings.set_parameter(name, arguments["value"])
        return None

    async def _getfd(self, arguments: Mapping[str, Json]) -> Json:
        self.descriptors.add(str(arguments["fdname"]), self.take_descriptor())
        return None

    async def _closefd(self, arguments: Mapping[str, Json]) -> Json:
        self.descriptors.remove(str(arguments["fdname"]))
        return None

    async def _pmemsave(self, arguments: Mapping[str, Json]) -> Json:
        address, size = int(str(arguments["val"])), int(str(arguments["size"]))
        path = str(arguments["filename"])
        if problem := self.memory_problem():
            raise CommandError(problem)
        block, offset = self._locate(address, size)
        try:
            offset += block.start
            await trio.to_thread.run_sync(_save, block.fd, offset, size, path)
        except OSError as error:
            raise CommandError(f"Could not open '{path}': {error.strerror}") from None
        return None

    def _locate(self, address: int, size: int) -> tuple[RamBlock, int]:
        for block in self.guest.blocks:
            offset = address - block.guest_address
            if offset >= 0 and 0 <= size <= block.length - offset:
                return block, offset
        raise CommandError(
            f"guest physical memory from {address:#x}, {size} bytes, is not RAM"
        )

    async def _quit(self, _: Mapping[str, Json]) -> Json:
        self.shut_down("host-qmp-quit")
        return None


def guest_runs(guest: Guest) -> str:
    """The run state that a guest begins with at the source."""
    return "running" if guest.state is GuestState.RUNNING else "prelaunch"


def _save(fd: int, offset: int, size: int, path: str) -> None:
    """Copy guest memory to a file; reading the file allocates no holes."""
    with open(path, "wb", opener=_open_at_once) as out:
        while size:
            chunk = os.pread(fd, min(size, SAVE_CHUNK), offset)
            if not chunk:
                raise OSError(0, "guest RAM is shorter than its block")
            out.write(chunk)
            offset += len(chunk)
            size -= len(chunk)


def _open_at_once(path: str, flags: int) -> int:
    """A FIFO that nobody reads is an error, not a thread that waits for ever."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)


def _nobody(name: str, data: Mapping[str, Json] | None) -> None:
    """No server yet: there is nobody to tell."""
