"""srcd and dstd as processes, driven over QMP as an operator would.

    with Source(dir, "--memory", "256M", …) as src, Destination(dir, …) as dst:
        src.wait_filled()
        move(src, dst, postcopy=True, preempt=True)

Everything is blocking; nothing sleeps: statuses are waited for as events, and
serial lines by watching the file.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.qmp.client import QmpClient
from support.report import REPORT_ADDRESS, REPORT_SIZE, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

START_SECONDS = 60.0
STATUS_SECONDS = 60.0
# The destination's guest has run if it has done this much more than before.
PROGRESS = 1000

POSTCOPY = ("postcopy-ram", "postcopy-blocktime")
PREEMPT = (*POSTCOPY, "postcopy-preempt")


class Daemon:
    """One daemon process with its control socket, serial file and log."""

    program = ""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        name: str | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        name = name or self.program
        self.qmp_path = directory / f"{name}.qmp"
        self.serial = directory / f"{name}.serial"
        self.log = directory / f"{name}.log"
        self.directory = directory
        self.statuses: list[str] = []
        words = [
            *wrapper,
            str(Path(sys.executable).with_name(self.program)),
            "serve",
            *("--qmp", str(self.qmp_path)),
            *arguments,
        ]
        if "--memory" in arguments:
            words += ["--serial", f"file:{self.serial}"]
        self._words = words

    def __enter__(self) -> Any:
        self.log.unlink(missing_ok=True)
        self.start()
        return self

    def start(self) -> None:
        """Start the process, the first time or after its end."""
        self.statuses.clear()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._words, stderr=log)
        try:
            self.qmp = self._connect()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def end(self, number: int = signal.SIGKILL) -> None:
        """End the process with a signal; its guest outlives it."""
        self.process.send_signal(number)
        self.process.wait(30)
        self.qmp.close()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            try:
                self.qmp.execute("quit")
            except (OSError, EOFError):
                self.process.terminate()
        self.qmp.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _connect(self) -> QmpClient:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client = QmpClient(str(self.qmp_path), timeout=STATUS_SECONDS)
                return client.__enter__()
            except (OSError, EOFError):  # or it has ended before it could greet
                if self.process.poll() is not None:
                    raise RuntimeError(f"{self.program} ended: {self.said}") from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # between two attempts to connect

    @property
    def said(self) -> str:
        """What the daemon wrote to its log."""
        return self.log.read_text(errors="replace")

    def execute(self, command: str, **arguments: Any) -> Any:
        names = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.qmp.execute(command, names)

    def set_capabilities(self, *names: str) -> None:
        wanted = [{"capability": n, "state": True} for n in ("events", *names)]
        self.execute("migrate-set-capabilities", capabilities=wanted)

    def set_parameters(self, **values: Any) -> None:
        self.execute("migrate-set-parameters", **values)

    def query(self) -> dict[str, Any]:
        return self.execute("query-migrate")

    @property
    def ours(self) -> dict[str, Any]:
        return self.query()["x-postcopyd"]

    def wait_status(self, *wanted: str, seconds: float = STATUS_SECONDS) -> str:
        """The next of these statuses, from events not yet looked at."""
        deadline = time.monotonic() + seconds
        while not self.statuses or self.statuses[-1] not in wanted:
            left = deadline - time.monotonic()
            event = self.qmp.wait_event("MIGRATION", max(left, 0.001))
            self.statuses.append(event["data"]["status"])
        return self.statuses[-1]

    def report(self) -> Report:
        """The test guest's own account."""
        path = self.directory / "report"
        self.qmp.execute(
            "pmemsave",
            {"val": REPORT_ADDRESS, "size": REPORT_SIZE, "filename": str(path)},
        )
        return Report.parse(path.read_bytes())

    def wait_report(self, condition: Any, seconds: float = 60.0) -> Report:
        """The first report that fulfils `condition`."""
        deadline = time.monotonic() + seconds
        while True:
            report = self.report()
            if condition(report):
                return report
            assert time.monotonic() < deadline, f"the guest does not come on: {report}"

    def own_memory(self) -> int:
        """Bytes of this process besides guest RAM: private and file pages."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        kib = (int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
        return sum(kib) << 10


class Source(Daemon):
    program = "srcd"

    def wait_filled(self, seconds: float = 120.0) -> Report:
        """Until the test guest has filled its area and begun to work."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.serial.read_text() if self.serial.exists() else ""
            if "filled" in text:
                return self.wait_report(lambda r: r.filled and r.checked > 0)
            assert time.monotonic() < deadline, f"the guest does not fill: {text}"
            assert self.process.poll() is None, self.said
            time.sleep(0.01)  # the guest writes to a file, which has no events

    def migrate(self, uri: str) -> None:
        self.statuses.clear()
        self.execute("migrate", uri=uri)


class Destination(Daemon):
    program = "dstd"

    def listen(self, uri: str = "tcp:127.0.0.1:0") -> str:
        """Wait for a source; the address it can reach."""
        self.execute("migrate-incoming", uri=uri, exit_on_error=False)
        (address,) = self.query()["socket-address"]
        if address["type"] == "unix":
            return f"unix:{address['path']}"
        return f"tcp:{address['host']}:{address['port']}"


def prepare(src: Daemon, dst: Daemon, *capabilities: str) -> None:
    for side in (src, dst):
        side.set_capabilities(*capabilities)


def move_precopy(src: Source, dst: Destination) -> None:
    """Capabilities set; to the end on both sides."""
    src.migrate(dst.listen())
    assert src.wait_status("completed", "failed") == "completed", src.query()
    assert dst.wait_status("completed", "failed") == "completed", dst.query()


def move_postcopy(src: Source, dst: Destination, *, after_bytes: int = 0) -> None:
    """Capabilities set; postcopy begins when so much was sent; to the end.

    A guest that writes next to nothing may have moved by precopy before that.
    """
    src.migrate(dst.listen())
    src.wait_status("active")
    if _sends(src, after_bytes):
        src.execute("migrate-start-postcopy")
    assert src.wait_status("completed", "failed") == "completed", src.query()
    assert dst.wait_status("completed", "failed") == "completed", dst.query()


def _sends(src: Source, so_much: int) -> bool:
    """Wait until it was sent; False if precopy was done with less."""
    while so_much:
        info = src.query()
        if info["status"] not in ("active", "device"):
            return False
        if info["ram"]["transferred"] >= so_much:
            return info["status"] == "active"
    return True


def assert_unharmed(dst: Destination, before: Report) -> Report:
    """The guest goes on from `before`, has checked pages, and found none wrong."""
    report = dst.wait_report(lambda r: r.counter > before.counter + PROGRESS)
    assert report.wrong == 0, report
    assert report.checked > before.checked
    for now, then in zip(report.vcpus, before.vcpus, strict=True):
        assert now.counter >= then.counter, "a vCPU's counter went back"
    return report
