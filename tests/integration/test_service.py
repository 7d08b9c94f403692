"""A daemon under a manager: its messages, its control socket, its signals.

The manager is the test: it hears what `$NOTIFY_SOCKET` is told.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.programs import BIN

from common.qmp.client import QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator

ACTIVATE = Path(__file__).resolve().parents[1] / "support" / "activate.py"
PATIENCE = 60.0  # seconds


class Service:
    """A daemon with what a manager gives: control socket, `$NOTIFY_SOCKET`."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self._socket = sock
        self.heard: list[str] = []

    def wait(self, wanted: str) -> str:
        """The next message that begins so."""
        while True:
            self.heard.append(self._socket.recv(4096).decode())
            if self.heard[-1].startswith(wanted):
                return self.heard[-1]


@contextmanager
def service(
    folder: Path, program: str, *words: str, watchdog: float | None = None
) -> Iterator[Service]:
    environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
    if watchdog:
        environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_UNIX) as control,
    ):
        sock.bind(str(folder / "notify"))
        sock.settimeout(PATIENCE)
        control.bind(str(folder / "q"))
        control.listen()
        fd = control.fileno()
        activate = [sys.executable, str(ACTIVATE), f"control={fd}", "--"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*activate, str(BIN / program), "serve", *words],
                env=environment,
                stderr=log,
                pass_fds=[fd],
            )
        control.close()  # the daemon's end is then its clients' end
        try:
            yield Service(process, sock)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def parked(folder: Path) -> list[str]:
    (folder / "ram").write_bytes(bytes(1 << 20))
    return ["--ram", f"ram={folder}/ram"]


def test_the_life_of_a_service(private_dir: Path) -> None:
    with service(private_dir, "srcd", *parked(private_dir), watchdog=0.3) as srcd:
        # The socket was there before the daemon: the client just waits.
        with QmpClient(private_dir / "q", timeout=PATIENCE) as client:
            srcd.wait("READY=1")
            assert srcd.wait("STATUS=") == "STATUS=no migration; the guest is running"
            for _ in range(3):
                srcd.wait("WATCHDOG=1")
            client.execute("stop")
            assert srcd.wait("STATUS=") == "STATUS=no migration; the guest is paused"
            client.execute("quit")
        srcd.wait("STOPPING=1")
        assert srcd.process.wait(PATIENCE) == 0
    # It is the manager's: the next daemon gets it.
    assert (private_dir / "q").is_socket()


def test_status_of_a_migration(private_dir: Path) -> None:
    words = parked(private_dir)
    with (
        service(private_dir, "srcd", *words) as srcd,
        QmpClient(private_dir / "q", timeout=PATIENCE) as client,
    ):
        srcd.wait("READY=1")
        client.execute("migrate", {"uri": f"file:{private_dir}/stream"})
        line = srcd.wait("STATUS=completed")
    assert line.startswith("STATUS=completed: 100 % of 1 MiB, pass ")
    assert line.endswith(" 0 MiB left; the guest is postmigrate")


def test_a_child_gets_no_sockets(private_dir: Path) -> None:
    """The built-in guest is started with the daemon's environment."""
    serial = f"file:{private_dir}/serial"
    words = ["--memory", "8M", "--accel", "process", "--paused", "--serial", serial]
    with service(private_dir, "srcd", *words) as srcd:
        srcd.wait("READY=1")
        (child,) = [
            pid
            for task in Path(f"/proc/{srcd.process.pid}/task").iterdir()
            for pid in (task / "children").read_text().split()
        ]
        assert "LISTEN_" not in Path(f"/proc/{child}/environ").read_text()
        sockets = [
            os.readlink(link)
            for link in Path(f"/proc/{child}/fd").iterdir()
            if os.readlink(link).startswith("socket:")
        ]
        assert len(sockets) == 1  # its connection to the daemon


def test_reload(private_dir: Path) -> None:
    config = private_dir / "c.toml"
    head = f'ram = ["ram={private_dir}/ram"]\n'
    parked(private_dir)
    config.write_text(f"{head}[parameters]\nmax-bandwidth = 1000\n")
    with (
        service(private_dir, "srcd", "--config", str(config)) as srcd,
        QmpClient(private_dir / "q", timeout=PATIENCE) as client,
    ):
        srcd.wait("READY=1")

        def reload(text: str) -> int:
            config.write_text(text)
            srcd.process.send_signal(signal.SIGHUP)
            srcd.wait("RELOADING=1\nMONOTONIC_USEC=")
            srcd.wait("READY=1")
            found: Any = client.execute("query-migrate-parameters")
            return found["max-bandwidth"]

        assert reload(f"{head}[parameters]\nmax-bandwidth = 2000\n") == 2000
        assert reload(f"{head}[parameters]\nmax-bandwith = 3000\n") == 2000
        assert reload(f'name = "x"\n{head}[parameters]\nmax-bandwidth = 4000\n') == 4000
    said = (private_dir / "log").read_text()
    assert "the configuration stays as it was" in said
    assert "did you mean 'max-bandwidth'?" in said
    assert "what else has changed takes a restart" in said


def test_hangup_without_a_file_is_the_end(private_dir: Path) -> None:
    with service(private_dir, "srcd", *parked(private_dir)) as srcd:
        srcd.wait("READY=1")
        srcd.process.send_signal(signal.SIGHUP)
        srcd.wait("STOPPING=1")
        assert srcd.process.wait(PATIENCE) == 0


def test_waiting_for_a_guest_is_said(private_dir: Path) -> None:
    path = private_dir / "guest"
    with service(private_dir, "dstd", "--guest", str(path)) as dstd:
        assert dstd.wait("STATUS=") == f"STATUS=waiting for a guest to attach at {path}"
        assert "READY=1" not in dstd.heard
