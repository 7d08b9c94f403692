"""How long a parked Linux guest takes until it runs again, in any of the ways.

    state = State.make(dir, memory=256 << 20)
    full = restore(state, FULL, rate=50_000_000)
    lazy = restore(state, LAZY, rate=50_000_000, until=Until.CHECKED)

One guest is saved by QEMU into its own two kinds of file, and parked; so all
restores begin with the same state. The QEMU that takes it is up and set up
before the time begins.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from support.daemons import Source
from support.linux_guest import LinuxGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Something between the two: its address, for the address of the destination.
    Between = Callable[[str], Any]

MIB: Final = 1 << 20
BOOT_SECONDS: Final = 240.0
PATIENCE: Final = 240.0
LOOK_SECONDS: Final = 0.001
PIECES_PER_SECOND: Final = 100
# What the kernel and the checks need besides the ballast.
OWN_MEMORY: Final = 176 * MIB
CHECKED_MEMORY: Final = 80 * MIB


class Until(Enum):
    """What the guest does at last in a restore; what comes before is timed too."""

    SAYS = "it says a line"
    CHECKED = "it has looked at all of its memory once"


@dataclass(frozen=True, slots=True)
class Way:
    """How a guest gets out of its files: by srcd, or by QEMU alone."""

    name: str
    options: tuple[str, ...] | None = None
    """srcd's; None: QEMU reads its own file."""
    capabilities: tuple[str, ...] = ()

    @property
    def lazy(self) -> bool:
        return "postcopy-ram" in self.capabilities


QEMU: Final = Way("qemu")
FULL: Final = Way("full", ("--restore", "precopy"))
LAZY: Final = Way("lazy", ("--no-working-set",), ("postcopy-ram",))
PREEMPT: Final = Way(
    "lazy-preempt", ("--no-working-set",), ("postcopy-ram", "postcopy-preempt")
)
LEARNED: Final = Way("lazy-learned", (), ("postcopy-ram",))
LEARNED_PREEMPT: Final = Way("learned-preempt", (), PREEMPT.capabilities)
LEARNING: Final = Way("learning", ("--learn", "5"), ("postcopy-ram",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds since the order to restore."""

    first_line: float
    checked: float | None = None
    """The guest has looked at all of its memory; None: nobody waited for that."""
    requested: int | None = None
    """Pages that it had to wait for until then."""


@dataclass(frozen=True, slots=True)
class State:
    """One guest, saved in every form."""

    directory: Path
    memory: int
    scatter: int = 0

    @classmethod
    def make(cls, directory: Path, memory: int, *, scatter: int = 0) -> State:
        """Boot a guest, fill its memory, save it right after a look at that.

        Between two pages of what it looks at lie `scatter` others.
        """
        state = cls(directory, memory, scatter)
        ballast = memory * 15 // 16 - OWN_MEMORY - CHECKED_MEMORY * scatter
        with state.guest("booted", ballast=ballast) as guest:
            said = guest.wait_console(lambda now: now.is_busy, BOOT_SECONDS)
            cycles = len(said.cycles)
            guest.wait_console(lambda now: len(now.cycles) > cycles, BOOT_SECONDS)
            guest.set_parameters(max_bandwidth=0)
            save(guest, state.stream)
            # QEMU saves a guest once; this one has run for a moment more.
            guest.execute("cont")
            guest.set_capabilities("mapped-ram")
            save(guest, state.mapped)
        program = Path(sys.executable).with_name("srcd")
        words = [str(program), "import", str(state.stream), str(state.parked)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return state

    @property
    def stream(self) -> Path:
        return self.directory / "stream"

    @property
    def mapped(self) -> Path:
        return self.directory / "mapped"

    @property
    def parked(self) -> Path:
        return self.directory / "parked"

    def guest(
        self, name: str, *, incoming: bool = False, ballast: int = 0
    ) -> LinuxGuest:
        (self.directory / f"{name}.serial").unlink(missing_ok=True)
        return LinuxGuest(
            self.directory,
            name,
            memory=self.memory,
            ballast=ballast,
            scatter=self.scatter,
            network=False,
            incoming=incoming,
        )

    def forget_servings(self) -> None:
        """What srcd keeps to go on with one that was not finished."""
        for kept in self.directory.glob("*.kept"):
            kept.unlink()


def save(guest: LinuxGuest, file: Path) -> None:
    guest.statuses.clear()
    guest.migrate(f"file:{file}")
    guest.wait_written(PATIENCE)


def learn(state: State) -> None:
    """Serve it to the end, so that srcd knows what it asks for."""
    restore(state, LEARNING, until=Until.CHECKED, to_the_end=True)


def restore(
    state: State,
    way: Way,
    *,
    rate: int = 0,
    between: Between | None = None,
    until: Until = Until.SAYS,
    to_the_end: bool = False,
) -> Times:
    """Run it again, at `rate` bytes per second (0: no limit), and end it then.

    `between` is a context with an address that leads to the destination's.
    """
    with ExitStack() as stack:
        guest = stack.enter_context(state.guest("restored", incoming=True))
        guest.set_capabilities(*way.capabilities)
        if way.options is None:
            begin = from_file(stack, state, guest, rate)
            srcd = None
        else:
            state.forget_servings()
            options = ("--parked", str(state.parked), "--clone", *way.options)
            srcd = stack.enter_context(Source(state.directory, *options))
            srcd.set_capabilities()
            srcd.set_parameters(max_bandwidth=rate, max_postcopy_bandwidth=rate)
            begin = from_server(stack, srcd, guest, between)
        begun = time.monotonic()
        begin()
        times = watch(guest, begun, until, srcd)
        if srcd and to_the_end:
            srcd.wait_status("completed", seconds=PATIENCE)
        else:
            # Neither may linger over what nobody needs any more.
            guest.process.kill()
        return times


def from_server(
    stack: ExitStack, srcd: Source, guest: LinuxGuest, between: Between | None
) -> Callable[[], None]:
    uri = guest.listen()
    if between:
        uri = stack.enter_context(between(uri))
    return lambda: srcd.migrate(uri)


def from_file(
    stack: ExitStack, state: State, guest: LinuxGuest, rate: int
) -> Callable[[], None]:
    """QEMU reads a file that it can map; through a link, the stream."""
    if not rate:
        guest.set_capabilities("mapped-ram")
        uri = f"file:{state.mapped}"
        return lambda: guest.execute("migrate-incoming", uri=uri)
    _, host, port = guest.listen().split(":")
    feeder = stack.enter_context(feeding(state.stream, (host, int(port)), rate))
    return feeder.start


@contextmanager
def feeding(
    file: Path, there: tuple[str, int], rate: int
) -> Iterator[threading.Thread]:
    """A thread that writes the file to the address, so many bytes per second."""
    thread = threading.Thread(target=feed, args=(file, there, rate), daemon=True)
    yield thread
    if thread.ident:
        thread.join(PATIENCE)


def feed(file: Path, there: tuple[str, int], rate: int) -> None:
    piece = rate // PIECES_PER_SECOND
    with file.open("rb") as stream, socket.create_connection(there) as sock:
        begun, sent = time.monotonic(), 0
        while data := stream.read(piece):
            sent += len(data)
            time.sleep(max(begun + sent / rate - time.monotonic(), 0))
            try:
                sock.sendall(data)
            except OSError:
                return  # the destination is not needed any more


# -- what the guest says --------------------------------------------------------

# A line that the move has cut does not look like this, but for its end.
LINE: Final = re.compile(rb"^c \d+\r?$", re.MULTILINE)
# The first look has begun before the move, so a whole one is told by the second.
CHECKED: Final = re.compile(rb"^h \d+ ok\r?$.*^h \d+ ok\r?$", re.M | re.S)


def watch(guest: LinuxGuest, begun: float, until: Until, srcd: Source | None) -> Times:
    says = wait_for(guest, LINE, begun)
    if until is Until.SAYS:
        return Times(first_line=says)
    checked = wait_for(guest, CHECKED, begun)
    requested = srcd.ours["urgent-pages"] if srcd else None
    return Times(first_line=says, checked=checked, requested=requested)


def wait_for(guest: LinuxGuest, line: re.Pattern[bytes], begun: float) -> float:
    """Seconds from `begun` until the destination's console has such a line."""
    while not line.search(guest.serial.read_bytes()):
        assert time.monotonic() < begun + PATIENCE, guest.console().last
        assert guest.process.poll() is None, guest.stderr
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - begun
