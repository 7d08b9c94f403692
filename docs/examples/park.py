"""Parks a Linux guest that runs in QEMU, and lets it run again lazily; shows it.

What an operator would do by hand, in order: start dstd with an empty directory,
let QEMU migrate into it, end that QEMU; later start another one that waits, start
srcd with the directory, migrate to QEMU. The guest runs as soon as it has its
device state, and fetches its memory as it goes. Run by `make demo-park`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from support.linux_guest import MEMORY, Console, LinuxGuest

from common.qmp.client import QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator

BANDWIDTH = 25 << 20  # of the link to the second QEMU, bytes per second
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.01
COUNTS = 100  # so far the guest has to count on


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, ExitStack() as stack:
        directory = Path(folder)
        parked = directory / "web1"
        first = LinuxGuest(directory, "first", disk=directory / "disk")
        with first:
            boot(first)
            park(first, directory, parked)
        before = first.console()
        say(f"\nNo QEMU runs any more. The guest has counted to {before.counts[-1]}.")
        show_directory(parked)
        second = LinuxGuest(
            directory, "second", disk=directory / "disk", incoming=True, earlier=first
        )
        stack.enter_context(second)
        run_again(second, directory, parked, before)
        report(second, before)


# --- the steps ------------------------------------------------------------------


def boot(guest: LinuxGuest) -> None:
    say(f"starting QEMU with a Linux guest of {MEMORY >> 20} MiB")
    with timed("the guest is up, counts, and has checked 80 MiB of its memory once"):
        guest.wait_busy()


def park(guest: LinuxGuest, directory: Path, parked: Path) -> None:
    with daemon("dstd", directory, "--park", str(parked)) as dstd:
        uri = listen(dstd)
        # With the return path QEMU hears whether all is safely on the disk.
        guest.set_capabilities("return-path")
        guest.set_parameters(max_bandwidth=0)
        say(f'QEMU: {{"execute": "migrate", "arguments": {{"uri": "{uri}"}}}}')
        with timed("the guest is parked"):
            guest.migrate(uri)
            guest.wait_status("completed")
    guest.execute("quit")


def show_directory(parked: Path) -> None:
    apparent = sum(path.stat().st_size for path in parked.iterdir())
    taken = sum(path.stat().st_blocks * 512 for path in parked.iterdir())
    say(
        f"It is {len(list(parked.iterdir()))} files of {apparent >> 20} MiB, which"
        f" take {taken >> 20} MiB of the disk.\n"
    )


def run_again(
    guest: LinuxGuest, directory: Path, parked: Path, before: Console
) -> None:
    guest.set_capabilities("postcopy-ram", "postcopy-preempt")
    with daemon("srcd", directory, "--parked", str(parked)) as srcd:
        srcd.execute("migrate-set-parameters", {"max-postcopy-bandwidth": BANDWIDTH})
        uri = guest.listen()
        say(f"serving it to another QEMU, at {BANDWIDTH >> 20} MiB per second")
        start = time.monotonic()
        srcd.execute("migrate", {"uri": uri})
        wait_for_line(guest, before)
        say(f"  {milliseconds(start)}: the guest says its first line")
        left = remaining(srcd) >> 20
        say(f"  {milliseconds(start)}: {left} MiB of its memory are still to come")
        guest.wait_status("completed")
        say(f"  {milliseconds(start)}: all of its memory is there")
        ours = srcd.execute("query-migrate")["x-postcopyd"]
        say(
            f"  pages that the guest had to wait for: {ours['urgent-pages']},"
            f" others: {ours['background-pages']}"
        )


def wait_for_line(guest: LinuxGuest, before: Console) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(guest.console().counts) <= len(before.counts):
        if time.monotonic() > deadline:
            sys.exit("the guest does not go on")
        time.sleep(LOOK_SECONDS)


def remaining(srcd: QmpClient) -> int:
    left: int = srcd.execute("query-migrate")["ram"]["remaining"]
    return left


def report(guest: LinuxGuest, before: Console) -> None:
    after = guest.wait_continued(before, counts=COUNTS)
    rows = {
        "counter": f"{before.counts[-1]} when it was parked, {after.counts[-1]} now,"
        " none left out",
        "memory": f"looked at {after.cycles[-1]} times, never wrong",
        "disk": f"{after.sectors[-1]} sectors written and read back",
        "network": f"{len(after.echoes)} answers from its gateway",
        "kernel": "no complaint",
    }
    say("")
    for name, value in rows.items():
        say(f"{name:10}{value}")
    say("\nThe guest was parked, runs again, and its memory is right.")


# --- the daemons -----------------------------------------------------------------


@contextmanager
def daemon(program: str, directory: Path, *options: str) -> Iterator[QmpClient]:
    """Start a daemon; a client once it serves."""
    qmp = directory / f"{program}.qmp"
    words = [
        str(Path(sys.executable).with_name(program)),
        *("serve", "--qmp", str(qmp), *options),
    ]
    say(f"starting {program}: {program} {' '.join(words[1:])}")
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        with connected(program, qmp, process) as client:
            yield client
            client.execute("quit")
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def connected(program: str, qmp: Path, process: subprocess.Popen[bytes]) -> QmpClient:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return QmpClient(str(qmp)).__enter__()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{program} did not start")
            time.sleep(LOOK_SECONDS)


def listen(dstd: QmpClient) -> str:
    dstd.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    (address,) = dstd.execute("query-migrate")["socket-address"]
    return f"tcp:{address['host']}:{address['port']}"


# --- saying what happens ------------------------------------------------------------


@contextmanager
def timed(done: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    say(f"  {milliseconds(start)}: {done}")


def milliseconds(start: float) -> str:
    return f"{(time.monotonic() - start) * 1000:6.0f} ms"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
