"""Moves a running guest between the two daemons on this machine, and shows it.

What an operator would do by hand, in order: start srcd with a guest and dstd
with an empty one, set capabilities on both, migrate, start postcopy, wait, and
ask the guest whether its memory is as it should be. Run by `make demo`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from support.report import REPORT_ADDRESS, REPORT_SIZE, Report

from common.qmp.client import QmpClient

MEMORY = "512M"
WRITE_RATE = "200M"  # what the guest writes per second
PRECOPY_BANDWIDTH = 150 << 20  # less than that: precopy alone would not end
PRECOPY_SECONDS = 1.5
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 60.0
CAPABILITIES = ("events", "postcopy-ram", "postcopy-preempt", "postcopy-blocktime")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, ExitStack() as stack:
        directory = Path(folder)
        source = start(stack, directory, "srcd", "--append", f"write-rate={WRITE_RATE}")
        destination = start(stack, directory, "dstd")
        before = wait_for_guest(source, directory)
        say(f"the guest runs at the source and has checked {before.checked} pages")
        for side in (source, destination):
            set_capabilities(side)
        migrate(source, destination)
        after = wait_for_progress(destination, directory, before)
        report(source, destination, before, after)
        for side in (source, destination):
            side.execute("quit")


def start(stack: ExitStack, directory: Path, program: str, *more: str) -> QmpClient:
    """Start a daemon with the built-in guest; a client once it serves."""
    qmp = directory / f"{program}.qmp"
    words = [
        str(Path(sys.executable).with_name(program)),
        *("serve", "--name", "demo", "--qmp", str(qmp), "--memory", MEMORY),
        *("--serial", f"file:{directory / program}.serial", *more),
    ]
    say(f"starting {program}: {program} {' '.join(words[1:])}")
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    stack.callback(process.wait, PATIENCE_SECONDS)
    stack.callback(process.terminate)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return stack.enter_context(QmpClient(str(qmp)))
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{program} did not start")
            time.sleep(0.02)


def set_capabilities(side: QmpClient) -> None:
    wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
    side.execute("migrate-set-capabilities", {"capabilities": wanted})


def migrate(source: QmpClient, destination: QmpClient) -> None:
    destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    (address,) = destination.execute("query-migrate")["socket-address"]
    source.execute("migrate-set-parameters", {"max-bandwidth": PRECOPY_BANDWIDTH})
    say(f"migrating to 127.0.0.1:{address['port']}: precopy")
    source.execute("migrate", {"uri": f"tcp:{address['host']}:{address['port']}"})
    watch(source, PRECOPY_SECONDS)
    say("precopy does not get done with a guest that writes so much: postcopy")
    source.execute("migrate-start-postcopy")
    watch(source, PATIENCE_SECONDS)
    status = source.execute("query-migrate")
    if status["status"] != "completed":
        sys.exit(f"the migration did not complete: {status}")
    destination.wait_event("MIGRATION", PATIENCE_SECONDS, status="completed")


def watch(source: QmpClient, seconds: float) -> None:
    """Show how far it is, until it is over or the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        info = source.execute("query-migrate")
        if "ram" in info:
            progress(info)
        if info["status"] in ("completed", "failed"):
            return
        time.sleep(LOOK_SECONDS)


def progress(info: dict[str, Any]) -> None:
    ram, ours = info["ram"], info["x-postcopyd"]
    say(
        f"  {info['status']:16} pass {ram['dirty-sync-count']},"
        f" {ram['transferred'] >> 20:5} MiB sent, {ram['remaining'] >> 20:4} MiB left,"
        f" {ours['urgent-pages']:6} urgent pages"
    )


def guest_report(side: QmpClient, directory: Path) -> Report:
    path = directory / "report"
    side.execute(
        "pmemsave",
        {"val": REPORT_ADDRESS, "size": REPORT_SIZE, "filename": str(path)},
    )
    return Report.parse(path.read_bytes())


def wait_for_guest(source: QmpClient, directory: Path) -> Report:
    """Until the guest has filled its memory and checks it."""
    serial = directory / "srcd.serial"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (serial.exists() and "filled" in serial.read_text()):
        if time.monotonic() > deadline:
            sys.exit("the guest did not fill its memory")
        time.sleep(0.05)
    return guest_report(source, directory)


def wait_for_progress(side: QmpClient, directory: Path, before: Report) -> Report:
    """Until the guest has gone over all of its memory once more."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        after = guest_report(side, directory)
        if after.wrong or after.checked > before.checked + 2 * after.area_pages:
            break
        time.sleep(0.05)
    return after


def report(
    source: QmpClient, destination: QmpClient, before: Report, after: Report
) -> None:
    sent = source.execute("query-migrate")
    got = destination.execute("query-migrate")
    ours, theirs = sent["x-postcopyd"], got["x-postcopyd"]
    latency = theirs["fault-latency"]
    postcopy = sent["total-time"] - ours["time-before-postcopy"]
    rows = {
        "total time": f"{sent['total-time']} ms",
        "downtime": f"{sent['downtime']} ms",
        "time in postcopy": f"{postcopy} ms",
        "pages, precopy": theirs["precopy-pages"],
        "pages, background": ours["background-pages"],
        "pages, urgent": f"{ours['urgent-pages']},"
        f" {ours['urgent-pages-on-preempt']} of them on the preempt channel",
        "pages, zero": sent["ram"]["duplicate"],
        "fault latency": f"p50 {us(latency['p50'])}, p99 {us(latency['p99'])},"
        f" max {us(latency['max'])} ({theirs['requests']} requests)",
        "guest: pages checked": f"{after.checked - before.checked} since the start",
        "guest: pages wrong": after.wrong,
        "guest: counter": f"{before.counter} before, {after.counter} after",
    }
    say("")
    for name, value in rows.items():
        say(f"{name:22} {value}")
    continued = after.counter > before.counter
    if after.wrong or not continued:
        sys.exit("the guest was harmed")
    say("\nThe guest moved, its memory is right, and it counts on.")


def us(nanoseconds: int) -> str:
    return f"{nanoseconds / 1000:.0f} us"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
