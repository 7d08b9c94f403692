"""A Linux guest in QEMU that counts, checks itself, and says so.

    with LinuxGuest(dir, "source", disk=True) as source:
        source.wait_console(Console.is_busy)
        ...
        source.migrate(uri)

What it writes to its serial console is in a file for each QEMU process. The
move cuts a line in two, so the files are joined before they are read:

    c N                     every 20 ms
    h CYCLE ok              all of 64 MiB that stay and 16 MiB that change is right
    d N ok                  a sector of its disk was written and read back
    64 bytes from ... seq=N QEMU's gateway has answered
    k TEXT                  a complaint of the kernel
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from support.qemu import PATIENCE, QemuProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOLDER = Path(__file__).resolve().parents[2] / "build" / "linux"
MEMORY = 192 << 20
DISK_SIZE = 1 << 20
LOOK_SECONDS = 0.02  # between two looks at a file, which has no events

# The fewer devices are looked for, the sooner the guest is up.
_KERNEL_WORDS = (
    *("console=ttyS0", "quiet", "loglevel=2", "8250.nr_uarts=1"),
    *("mitigations=off", "nokaslr", "tsc=reliable", "no_timer_check"),
    *("cryptomgr.notests", "audit=0", "random.trust_cpu=on", "init_on_alloc=0"),
)

# What a kernel says when its processor had to wait, for a page or for a busy host.
_ABOUT_WAITING = re.compile(r"k (hrtimer: interrupt took|clocksource: ).*")


@dataclass(frozen=True)
class Console:
    """What a guest has said so far, over all its moves."""

    counts: tuple[int, ...]
    cycles: tuple[int, ...]  # good ones
    sectors: tuple[int, ...]
    echoes: tuple[int, ...]
    wrong: tuple[str, ...]  # lines about memory or disk
    complaints: tuple[str, ...]
    last: tuple[str, ...]  # lines of any kind

    @classmethod
    def read(cls, *files: Path) -> Console:
        """Join the files of a guest's processes, in the order of its moves."""
        return cls.parse(b"".join(file.read_bytes() for file in files))

    @classmethod
    def parse(cls, data: bytes) -> Console:
        whole = data[: data.rfind(b"\n") + 1].decode("ascii", errors="replace")
        lines = whole.replace("\r", "").splitlines()

        def numbers(pattern: str) -> tuple[int, ...]:
            found = (re.fullmatch(pattern, line) for line in lines)
            return tuple(int(match[1]) for match in found if match)

        return cls(
            counts=numbers(r"c (\d+)"),
            cycles=numbers(r"h (\d+) ok"),
            sectors=numbers(r"d (\d+) ok"),
            echoes=numbers(r"64 bytes from .* seq=(\d+) .*"),
            wrong=tuple(line for line in lines if re.match(r"[hd] \d+ wrong", line)),
            complaints=tuple(
                line
                for line in lines
                if line.startswith("k ") and not _ABOUT_WAITING.match(line)
            ),
            last=tuple(lines[-5:]),
        )

    @property
    def is_busy(self) -> bool:
        """Whether the guest is up and has looked at its memory once."""
        return bool(self.counts and self.cycles)

    def assert_good(self) -> None:
        """Nothing was lost, doubled or changed, and nobody complains."""
        assert not self.wrong, self.wrong
        assert not self.complaints, self.complaints
        for said in (self.counts, self.cycles, self.sectors):
            expected = tuple(range(said[0], said[0] + len(said))) if said else ()
            assert said == expected, _first_gap(said, expected)


def _first_gap(said: tuple[int, ...], expected: tuple[int, ...]) -> str:
    place = next(
        i
        for i, pair in enumerate(zip(said, expected, strict=True))
        if pair[0] != pair[1]
    )
    return f"... {said[max(place - 3, 0) : place + 3]} ..."


class LinuxGuest(QemuProcess):
    """A QEMU with a Linux guest, or one that waits for such a guest.

    `name` is that of its files in `directory`; `disk` the image of its disk,
    made if it is not there. `earlier` is where the guest has run before, so
    that its console goes on. `ballast` are bytes of its `memory` that it fills
    with data and never looks at again; `scatter` pages of such data lie between
    two pages of the memory that it looks at. Without a `network` it has less to
    do.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        machine: str = "pc",
        version: str = "10",
        disk: Path | None = None,
        memory: int = MEMORY,
        ballast: int = 0,
        scatter: int = 0,
        network: bool = True,
        incoming: bool = False,
        earlier: LinuxGuest | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(version=version, incoming=incoming, arguments=arguments)
        self.machine = machine
        self._memory = memory
        self._ballast = ballast
        self._scatter = scatter
        self._network = network
        self.serial = directory / f"{name}.serial"
        self.consoles = [*(earlier.consoles if earlier else []), self.serial]
        self._disk = disk
        if disk is not None and not disk.exists():
            disk.write_bytes(bytes(DISK_SIZE))

    def _machine_arguments(self) -> list[str]:
        arguments = ["-M", self.machine, "-accel", "tcg", "-m", f"{self._memory}B"]
        arguments += ["-serial", f"file:{self.serial}"]
        if self._network:
            arguments += ["-netdev", "user,id=net,restrict=on"]
            arguments += ["-device", "virtio-net-pci,netdev=net,romfile="]
        if self._disk is not None:
            arguments += ["-drive", f"if=none,id=disk,format=raw,file={self._disk}"]
            arguments += ["-device", "virtio-blk-pci,drive=disk"]
        if not self._incoming:
            arguments += ["-kernel", str(FOLDER / "vmlinuz")]
            arguments += ["-initrd", str(FOLDER / "initramfs")]
            arguments += ["-append", " ".join(self._kernel_words())]
        return arguments

    def _kernel_words(self) -> tuple[str, ...]:
        words = [*_KERNEL_WORDS]
        if self._ballast:
            words.append(f"ballast={self._ballast >> 20}")
        if self._scatter:
            # A huge page would keep what is to be scattered together.
            words += [f"scatter={self._scatter}", "transparent_hugepage=never"]
        return tuple(words)

    # -- what the guest says --------------------------------------------------

    def console(self) -> Console:
        """All that the guest has said, here and before."""
        return Console.read(*self.consoles)

    def wait_console(
        self, condition: Callable[[Console], bool], patience: float = PATIENCE
    ) -> Console:
        """Until the guest has said enough; it has to be good."""
        deadline = time.monotonic() + patience
        while not condition(found := self.console()):
            assert time.monotonic() < deadline, f"it stays at {found.last}"
            assert self.process.poll() is None, self.stderr
            time.sleep(LOOK_SECONDS)
        found.assert_good()
        return found

    def wait_busy(self) -> Console:
        """Until the guest is up and all of its checks have come by."""
        return self.wait_console(
            lambda said: (
                said.is_busy
                and bool(said.echoes)
                and bool(said.sectors or self._disk is None)
            )
        )

    def wait_continued(self, before: Console, *, counts: int = 50) -> Console:
        """Until a guest that said `before` has gone on here, with right memory.

        It has to count on by `counts`, to finish two looks at its memory (the
        first may have begun before the move), and to use its disk and network.
        """
        return self.wait_console(
            lambda said: (
                len(said.counts) >= len(before.counts) + counts
                and len(said.cycles) >= len(before.cycles) + 2
                and len(said.echoes) >= len(before.echoes) + 2
                and len(said.sectors) >= len(before.sectors) + (5 if self._disk else 0)
            )
        )
