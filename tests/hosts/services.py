"""A guest between the two hosts, moved by the units as an operator would.

    with moving(bed, "web1") as move:
        move.to_postcopy()
        bed.link.drop()
        move.wait_paused()

`move.src` and `move.dst` speak QMP to the daemons, whose control sockets are
systemd's: the first client starts a daemon.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from hosts.link import ADDRESSES
from support.daemons import (
    PREEMPT,
    Daemon,
    Destination,
    Source,
    assert_unharmed,
    prepare,
)
from support.report import REPORT_ADDRESS, REPORT_SIZE, Report, ReportError

from common.qmp.client import QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts.bed import Bed, Host

ETC = "/etc/postcopyd"
RUN = "/run/postcopyd"
KERNEL = "/usr/share/postcopyd/test-guest.elf"
MEMORY = "--memory 64M"
EMPTY = f"{MEMORY} --incoming"
PORT = 4444
LISTEN = f"tcp:0.0.0.0:{PORT}"
PEER_TIMEOUT = 1  # seconds
PATIENCE = 60.0
# Bytes per second: long enough in postcopy to be interrupted.
SLOW = 1 << 20


class Unit(Daemon):
    """A daemon that a host's systemd runs; `name` is its guest's."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.unit = f"{self.program}@{name}.service"
        self.socket = f"{self.program}@{name}.socket"
        self.guest = f"postcopyd-guest@{name}.service"
        self.directory = host.path(RUN)
        self._place = f"{RUN}/{self.program}-{name}.qmp"
        self._report = f"{RUN}/{name}.report"
        self.statuses: list[str] = []

    def connect(self) -> None:
        """As a client; the daemon is started if it does not run."""
        self.qmp = QmpClient(self.host.path(self._place), timeout=PATIENCE)

    def report(self) -> Report:
        """Once there is one; a guest needs a moment before its first."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._read_report()
            except ReportError:
                assert time.monotonic() < deadline, "the guest has not begun"

    def _read_report(self) -> Report:
        place = {"val": REPORT_ADDRESS, "size": REPORT_SIZE, "filename": self._report}
        self.qmp.execute("pmemsave", place)
        return Report.parse(self.host.path(self._report).read_bytes())

    @property
    def said(self) -> str:
        return self.host.text(self.unit)

    @property
    def pid(self) -> int:
        return int(self.host.show(self.unit, "MainPID"))

    def kill(self) -> None:
        """Suddenly; it does not run when this returns."""
        self.host.systemctl("kill", "--signal=KILL", self.unit)

    def wait_query(self, *wanted: str) -> dict[str, Any]:
        """Until query-migrate has one of these statuses."""
        deadline = time.monotonic() + PATIENCE
        while (info := self.query()).get("status") not in wanted:
            assert time.monotonic() < deadline, (self.unit, info, self.said)
            time.sleep(0.02)  # a daemon that began anew has no events to send
        return info


class SourceUnit(Unit, Source):
    pass


class DestinationUnit(Unit, Destination):
    pass


class Move:
    """One guest: both ends, what breaks between them, and what is left to do."""

    def __init__(self, bed: Bed, name: str, *, back: bool = False) -> None:
        source, destination = reversed(bed.hosts) if back else bed.hosts
        self.bed = bed
        self.name = name
        self.there = f"tcp:{ADDRESSES[destination.name]}:{PORT}"
        self.src = SourceUnit(source, name)
        self.dst = DestinationUnit(destination, name)
        self.preempt = False

        self.sides: tuple[Unit, Unit] = (self.src, self.dst)

    def begin(self) -> None:
        """What docs/operations.md says, at the destination and at the source."""
        for side in reversed(self.sides):
            side.host.systemctl("start", side.socket, side.guest)
            side.connect()
        self.before = self.src.wait_report(lambda r: r.filled and r.checked > 0)

    def end(self) -> None:
        """Nothing of it runs any more; of a guest that has moved, nothing here."""
        for side in self.sides:
            if hasattr(side, "qmp"):
                side.qmp.close()
            side.host.systemctl("stop", side.socket, side.unit)

    def way_back(self) -> Move:
        """After it is completed: the guest may go to where it came from."""
        self.end()
        self.src.host.systemctl("stop", self.src.guest)
        files(self.src.host, self.name, EMPTY)
        files(self.dst.host, self.name, "")
        return Move(self.bed, self.name, back=True)

    def to_precopy(self) -> None:
        """On its way, and slow enough to be interrupted; `incoming` is in the file."""
        self.src.set_capabilities()
        self.src.set_parameters(max_bandwidth=SLOW)
        self.src.migrate(self.there)
        self.src.wait_status("active")

    # --- to the middle of postcopy --------------------------------------------

    def to_postcopy(self, *capabilities: str) -> None:
        """Until some pages have come in postcopy, and most have not."""
        capabilities = capabilities or PREEMPT
        self.preempt = "postcopy-preempt" in capabilities
        prepare(self.src, self.dst, *capabilities)
        self.src.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
        self.dst.execute("migrate-incoming", uri=LISTEN)
        self.src.migrate(self.there)
        self.src.wait_status("active")
        self.src.execute("migrate-start-postcopy")
        self.src.wait_status("postcopy-active")
        self.dst.wait_status("postcopy-active")
        self.wait_pages(50)

    @property
    def remaining(self) -> int:
        """Bytes that the source still owes."""
        left: int = self.src.query()["ram"]["remaining"]
        return left

    def wait_pages(self, more: int) -> None:
        """Until so many pages more have come in postcopy."""
        wanted = self.dst.ours["postcopy-pages"] + more
        deadline = time.monotonic() + PATIENCE
        while self.dst.ours["postcopy-pages"] < wanted:
            assert time.monotonic() < deadline, self.dst.query()

    # --- after it broke ---------------------------------------------------------

    def wait_paused(self) -> None:
        """Both know it, and the guest runs on with the pages that it has."""
        for side in self.sides:
            side.wait_query("postcopy-paused")
        assert self.dst.execute("query-status")["running"]
        assert self.remaining > 0

    def reconnect(self) -> None:
        """To daemons that have begun anew."""
        for side in self.sides:
            side.qmp.close()
            side.connect()
            side.statuses.clear()

    def recover(self) -> None:
        """By hand: the destination listens, the source comes back."""
        self.dst.execute("migrate-recover", uri=LISTEN)
        self.resume()

    def resume(self) -> None:
        """Again and again: hosts need a moment to find each other after a cut."""
        deadline = time.monotonic() + PATIENCE
        while not self.try_resume():
            assert time.monotonic() < deadline, self.src.query()

    def try_resume(self) -> bool:
        """Whether it goes on, or else is paused again."""
        self.src.execute("migrate", uri=self.there, resume=True)
        ends = ("postcopy-active", "completed", "postcopy-paused")
        return self.src.wait_query(*ends)["status"] != "postcopy-paused"

    def complete(self) -> Report:
        """To the end at full speed, and the guest's own account of it."""
        self.src.set_parameters(max_postcopy_bandwidth=0)
        return self.wait_completed()

    def wait_completed(self) -> Report:
        for side in self.sides:
            info = side.wait_query("completed", "failed")
            assert info["status"] == "completed", (info, side.said)
        return assert_unharmed(self.dst, self.before)


def files(host: Host, name: str, guest: str, *lines: str) -> None:
    """The configuration of a guest's daemon, and its VMM's options."""
    head = (f'name = "{name}"', f'guest = "{RUN}/{name}.guest"')
    host.write(f"{ETC}/{name}.toml", "\n".join((*head, *lines, "")))
    # systemd's own quoting, systemd.exec(5).
    host.write(f"{ETC}/{name}.guest", f"OPTIONS='{guest}'\n")


@contextlib.contextmanager
def moving(
    bed: Bed,
    name: str,
    *lines: str,
    area: str = "48M",
    peer_timeout: int = PEER_TIMEOUT,
    incoming: str = "defer",
) -> Iterator[Move]:
    """A guest of this name at the source, an empty one at the destination.

    `area` is what the guest writes, `incoming` where the destination listens at
    once; `lines` are more of both configurations.
    """
    lines = (f"peer-timeout = {peer_timeout}", *lines)
    work = f'--append "area={area} write-rate=8M"'
    files(bed.source, name, f"{MEMORY} --kernel {KERNEL} {work}", *lines)
    files(bed.destination, name, EMPTY, f'incoming = "{incoming}"', *lines)
    move = Move(bed, name)
    try:
        move.begin()
        yield move
    finally:
        print(move.src.said, move.dst.said, sep="\n")
        move.end()
        for side in move.sides:
            side.host.systemctl("stop", side.guest)
        bed.link.mend()
