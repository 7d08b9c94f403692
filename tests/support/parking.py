"""Parks Linux guests and serves them again, as an operator would.

    with Workshop(dir, machine="q35") as shop:
        before = shop.boot_parked("postcopy")
        guest = shop.serve("lazy")
        guest.wait_continued(before)

Each QEMU and each daemon is a process of its own, and all end with the workshop.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest

from support import booted
from support.booted import Kind
from support.daemons import Destination, Source
from support.ports import free_address
from support.qemu import PATIENCE, QemuProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from support.linux_guest import Console, LinuxGuest
    from support.relay import Relay

# How a guest gets into a directory, and what both sides have to be set to.
INTO = {
    "precopy": ("return-path",),
    "postcopy": ("return-path", "postcopy-ram"),
    "preempt": ("return-path", "postcopy-ram", "postcopy-preempt"),
}
# How it gets out: what srcd is told, and what QEMU has to be set to.
OUT = {
    "full": (("--restore", "precopy"), ()),
    "lazy": ((), ("postcopy-ram",)),
    "preempt": ((), ("postcopy-ram", "postcopy-preempt")),
}
SLOW = 16 << 20  # bytes per second; precopy is not over before postcopy starts
CRAWL = 2 << 20  # bytes per second; there is time to cut a postcopy
FAST = 0  # no limit

postcopy_in = pytest.mark.parametrize(
    ("version", "into"), [("10", "postcopy"), ("10", "preempt"), ("7.2", "postcopy")]
)
postcopy_out = pytest.mark.parametrize(
    ("version", "out"), [("10", "lazy"), ("10", "preempt"), ("7.2", "lazy")]
)


class Workshop:
    """A place for one guest: its directory, its disk, the QEMUs that it runs in.

    `last` is the one that it has run in last.
    """

    def __init__(
        self,
        directory: Path,
        *,
        machine: str = "pc",
        version: str = "10",
        disk: bool = True,
        arguments: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.parked = directory / "parked"
        self.kind = Kind(machine, version, disk, tuple(arguments))
        self.last: LinuxGuest | None = None
        self._stack = ExitStack()
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _name(self, program: str) -> str:
        self._number += 1
        return f"{program}-{self._number}"

    # -- QEMU -----------------------------------------------------------------

    def boot(self) -> LinuxGuest:
        """A guest that is up and has shown all that it does."""
        guest = booted.start(self.kind, self.directory, self._name("qemu"))
        self.last = self._stack.enter_context(guest)
        booted.run(self.kind, guest)
        guest.wait_busy()
        return guest

    def waiting(self, *capabilities: str, arguments: Sequence[str] = ()) -> LinuxGuest:
        """A QEMU for the guest to come to."""
        self.last = self._waiting(capabilities, earlier=self.last, more=arguments)
        return self.last

    def clone(self, *capabilities: str) -> LinuxGuest:
        """A QEMU for a copy of the guest; its console is its own."""
        return self._waiting(capabilities)

    def _waiting(self, capabilities: tuple[str, ...], **more: Any) -> LinuxGuest:
        guest = self.kind.qemu(
            self.directory, self._name("qemu"), incoming=True, **more
        )
        self._stack.enter_context(guest)
        guest.set_capabilities(*capabilities)
        return guest

    # -- the daemons ----------------------------------------------------------

    @contextmanager
    def parker(self, *options: str) -> Iterator[Destination]:
        """A dstd that puts into the directory what comes."""
        with self.parker_again(*options) as dstd:
            dstd.set_capabilities()
            yield dstd

    @contextmanager
    def parker_again(self, *options: str) -> Iterator[Destination]:
        """One that takes up what another has begun; its capabilities are set."""
        with Destination(
            self.directory,
            *("--park", str(self.parked)),
            *options,
            name=self._name("dstd"),
        ) as dstd:
            yield dstd

    @contextmanager
    def server(self, *options: str) -> Iterator[Source]:
        """A srcd that has the directory's guest to give."""
        with self.server_again(*options) as srcd:
            srcd.set_capabilities()
            yield srcd

    @contextmanager
    def server_again(self, *options: str) -> Iterator[Source]:
        """One that takes up what another has begun; its capabilities are set."""
        with Source(
            self.directory,
            *("--parked", str(self.parked)),
            *options,
            name=self._name("srcd"),
        ) as srcd:
            yield srcd

    # -- there and back -------------------------------------------------------

    def boot_parked(self, into: str) -> Console:
        """Until a guest that was up is in the directory; what it has said."""
        guest = self.boot()
        self.park(guest, into)
        return guest.console()

    def park(self, guest: LinuxGuest, into: str) -> None:
        """Until the guest is in the directory; its QEMU is ended then."""
        with self.parker() as dstd:
            begin_parking(guest, dstd, into)
            guest.set_parameters(max_postcopy_bandwidth=FAST, max_bandwidth=FAST)
            both_complete(guest, dstd)
        end(guest)

    def serve(self, out: str, *, arguments: Sequence[str] = ()) -> LinuxGuest:
        """Until the guest is wholly in a new QEMU, which has these arguments, too."""
        options, capabilities = OUT[out]
        guest = self.waiting(*capabilities, arguments=arguments)
        with self.server(*options) as srcd:
            srcd.set_parameters(max_bandwidth=FAST)
            srcd.migrate(guest.listen())
            both_complete(srcd, guest)
        return guest

    @contextmanager
    def arriving(
        self, into: str, relay: Relay | None = None
    ) -> Iterator[tuple[LinuxGuest, Destination]]:
        """A guest that was up is on its way into the directory, slowly."""
        guest = self.boot()
        guest.set_parameters(max_postcopy_bandwidth=CRAWL)
        with self.parker() as dstd:
            begin_parking(guest, dstd, into, relay)
            yield guest, dstd

    @contextmanager
    def leaving(
        self, out: str, relay: Relay | None = None
    ) -> Iterator[tuple[Source, LinuxGuest]]:
        """The guest runs in a new QEMU, to which its memory comes slowly."""
        options, capabilities = OUT[out]
        guest = self.waiting(*capabilities)
        with self.server(*options) as srcd:
            srcd.set_parameters(max_postcopy_bandwidth=CRAWL)
            uri = guest.listen()
            srcd.migrate(relay.to(uri) if relay else uri)
            wait_status((srcd, guest), "postcopy-active")
            guest.wait_event("RESUME")
            yield srcd, guest


def begin_parking(
    guest: LinuxGuest, dstd: Destination, into: str, relay: Relay | None = None
) -> None:
    """Until it is on its way, by precopy or by postcopy."""
    guest.set_capabilities(*INTO[into])
    guest.set_parameters(max_bandwidth=SLOW)
    uri = dstd.listen()
    guest.migrate(relay.to(uri) if relay else uri)
    guest.wait_status("active")
    if into != "precopy":
        guest.start_postcopy()
        guest.wait_status("postcopy-active")
        dstd.wait_status("postcopy-active")


def both_complete(source: Any, destination: Any) -> None:
    """Of any two kinds of ends."""
    for side in (source, destination):
        if isinstance(side, QemuProcess):
            side.wait_status("completed")
        else:
            found = side.wait_status("completed", "failed")
            other = destination if side is source else source
            assert found == "completed", (side.query(), side.said, words_of(other))


def _remaining(source: Any) -> int:
    found: int = source.query()["ram"]["remaining"]
    return found


def wait_for_pages(source: Any) -> None:
    """Until some have been sent; there are others to come."""
    start = _remaining(source)
    deadline = time.monotonic() + PATIENCE
    while (left := _remaining(source)) >= start:
        assert time.monotonic() < deadline, f"{left} bytes remain"
    assert left > 0


def wait_status(sides: tuple[Any, Any], status: str) -> None:
    for side in sides:
        side.wait_status(status)


def recover(source: Any, destination: Any, relay: Relay | None = None) -> None:
    """From a pause on both sides until pages come again."""
    uri = free_address()
    # Out of band: QEMU's main thread may itself be waiting for a page.
    if isinstance(destination, QemuProcess):
        destination.recover(uri)
    else:
        destination.execute("migrate-recover", uri=uri)
    source.execute("migrate", uri=relay.to(uri) if relay else uri, resume=True)
    wait_status((source, destination), "postcopy-active")


def words_of(side: Any) -> str:
    return side.stderr if isinstance(side, QemuProcess) else side.said


def end(guest: LinuxGuest) -> None:
    """A guest that has been parked must not run here again."""
    guest.execute("quit")
    guest.process.wait(30)
