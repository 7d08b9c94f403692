"""The control surface of both daemons, as processes: every command in its states."""

from __future__ import annotations

import array
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import Destination, Source, assert_unharmed, prepare

from common.qmp.client import CommandFailed, QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 16 << 20
PAGE = 4096
PAUSE = (
    "migrate-pause is currently only supported during postcopy-active or"
    " postcopy-recover state"
)
RECOVER = "Migrate recover can only be run when postcopy is paused."


def fill(path: Path, size: int = SIZE) -> None:
    with path.open("wb") as file:
        for offset in range(0, size, PAGE):
            file.write(offset.to_bytes(8, "little").ljust(PAGE, b"x"))


def source(folder: Path, *more: str) -> Source:
    path = folder / "source.ram"
    fill(path)
    return Source(folder, "--ram", f"ram={path}", *more)


def destination(folder: Path, *more: str) -> Destination:
    ram = f"ram={folder / 'target.ram'},size={SIZE}"
    return Destination(folder, "--ram", ram, *more)


def equal(folder: Path) -> bool:
    return (folder / "source.ram").read_bytes() == (folder / "target.ram").read_bytes()


def refusal(side: Any, command: str, **arguments: Any) -> str:
    with pytest.raises(CommandFailed) as error:
        side.execute(command, **arguments)
    assert error.value.error_class == "GenericError"
    return error.value.desc


@pytest.fixture
def pair(private_dir: Path) -> Iterator[tuple[Source, Destination]]:
    with source(private_dir) as srcd, destination(private_dir) as dstd:
        prepare(srcd, dstd)
        yield srcd, dstd


# --- orders in every state ------------------------------------------------------


def test_orders_without_a_migration(pair: tuple[Source, Destination]) -> None:
    srcd, dstd = pair
    for side in pair:
        assert side.query() == {}
        assert refusal(side, "migrate-pause") == PAUSE
        assert refusal(side, "migrate-recover", uri="nonsense") == RECOVER
        assert side.execute("migrate_cancel") == {}
        assert side.execute("migrate-continue", state="none") == {}
        assert (
            refusal(side, "migrate-continue", state="active")
            == "Migration not in expected state: none"
        )
        assert (
            refusal(side, "migrate", uri="unix:/nowhere", resume=True)
            == "Cannot resume if there is no paused migration"
        )
        assert refusal(side, "migrate") == "need either 'uri' or 'channels' argument"
        assert refusal(side, "migrate", uri="tcp:") == "error parsing address ''"
    words = "'-incoming' was not specified on the command line"
    assert refusal(srcd, "migrate-incoming", uri="bogus:") == words
    words = "Guest is waiting for an incoming migration"
    assert refusal(dstd, "migrate", uri="unix:/nowhere") == words


def test_out_of_band_while_the_other_commands_wait(private_dir: Path) -> None:
    """A capture of a pipe blocks nobody: migrate-pause is answered at once."""
    with source(private_dir) as srcd, QmpClient(srcd.qmp_path, oob=True) as client:
        with pytest.raises(CommandFailed, match="migrate-pause is currently"):
            client.execute_oob("migrate-pause")
        with pytest.raises(CommandFailed, match="can only be run when"):
            client.execute_oob("migrate-recover", {"uri": "unix:/nowhere"})
        with pytest.raises(CommandFailed, match="does not support OOB"):
            client.execute_oob("migrate_cancel")


def test_what_is_opened_at_once_fails_at_once(private_dir: Path) -> None:
    with source(private_dir) as srcd:
        srcd.set_capabilities()
        for uri, words in (
            ("fd:nope", "File descriptor named 'nope' has not been found"),
            ("file:/no/x", "Could not create '/no/x': No such file or directory"),
        ):
            srcd.statuses.clear()
            assert refusal(srcd, "migrate", uri=uri) == words
            assert srcd.query() == {"status": "failed", "error-desc": words}
            assert srcd.wait_status("failed") == "failed"
            assert srcd.statuses == ["setup", "failed"]


def test_tls_is_refused_instead_of_left_out(pair: tuple[Source, Destination]) -> None:
    for side, command in zip(pair, ("migrate", "migrate-incoming"), strict=True):
        side.set_parameters(tls_creds="tls0")
        assert refusal(side, command, uri="tcp:127.0.0.1:0").startswith("TLS is not")
        side.set_parameters(tls_creds=None)


# --- pause-before-switchover ----------------------------------------------------


def test_hold_before_the_switchover(pair: tuple[Source, Destination]) -> None:
    srcd, dstd = pair
    srcd.set_capabilities("pause-before-switchover")
    srcd.migrate(dstd.listen())
    srcd.wait_status("pre-switchover", "completed", "failed")
    assert srcd.statuses == ["setup", "active", "pre-switchover"]
    assert srcd.execute("query-status")["status"] == "finish-migrate"
    for state in ("active", "device"):
        words = "Migration not in expected state: pre-switchover"
        assert refusal(srcd, "migrate-continue", state=state) == words
    assert srcd.query()["status"] == "pre-switchover"
    srcd.execute("migrate-continue", state="pre-switchover")
    assert srcd.wait_status("completed", "failed") == "completed"
    assert srcd.statuses[-2:] == ["device", "completed"]
    assert dstd.wait_status("completed", "failed") == "completed"
    assert equal(srcd.directory)


def test_cancel_what_is_held(pair: tuple[Source, Destination]) -> None:
    srcd, dstd = pair
    srcd.set_capabilities("pause-before-switchover")
    srcd.migrate(dstd.listen())
    srcd.wait_status("pre-switchover")
    srcd.execute("migrate_cancel")
    srcd.wait_status("cancelled")
    names = [event["event"] for event in srcd.qmp.events()]
    assert "RESUME" in names
    assert srcd.statuses[-2:] == ["cancelling", "cancelled"]
    assert srcd.execute("query-status") == {"status": "running", "running": True}


def test_the_destination_dies_while_it_is_held(private_dir: Path) -> None:
    with source(private_dir) as srcd:
        srcd.set_capabilities("pause-before-switchover")
        with destination(private_dir) as dstd:
            dstd.set_capabilities()
            srcd.migrate(dstd.listen())
            srcd.wait_status("pre-switchover")
            dstd.process.kill()
            assert srcd.wait_status("failed", "completed") == "failed"
        assert srcd.execute("query-status")["status"] == "running"


def test_quit_says_what_it_ends(pair: tuple[Source, Destination]) -> None:
    srcd, dstd = pair
    srcd.set_capabilities("pause-before-switchover")
    srcd.migrate(dstd.listen())
    srcd.wait_status("pre-switchover")
    srcd.qmp.events()
    srcd.execute("quit")
    said = [(e["event"], e.get("data")) for e in srcd.qmp._events]
    assert said == [
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}),
        ("MIGRATION", {"status": "cancelling"}),
    ]
    assert srcd.process.wait(20) == 0


# --- migrate-pause --------------------------------------------------------------


@pytest.mark.userfaultfd
@pytest.mark.parametrize("who", ["source", "destination"])
def test_pause(private_dir: Path, who: str) -> None:
    """Both sides pause; the guest keeps what it has; out-of-band."""
    memory = ("--memory", "64M", "--accel", "process")
    slow = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 1 << 20}
    with (
        Source(private_dir, *memory, "--append", "area=32M") as srcd,
        Destination(private_dir, *memory) as dstd,
    ):
        prepare(srcd, dstd, "postcopy-ram")
        srcd.wait_filled()
        srcd.qmp.execute("migrate-set-parameters", slow)
        srcd.migrate(dstd.listen())
        srcd.wait_status("active")
        srcd.execute("migrate-start-postcopy")
        assert srcd.wait_status("postcopy-active", "completed") == "postcopy-active"
        dstd.qmp.wait_event("RESUME")
        assert refusal(srcd, "migrate_cancel").startswith("Postcopy migration in")
        assert refusal(dstd, "migrate-recover", uri="x") == RECOVER
        asked = {"source": srcd, "destination": dstd}[who]
        with QmpClient(asked.qmp_path, oob=True) as client:
            client.execute_oob("migrate-pause")
        for side in (srcd, dstd):
            assert side.wait_status("postcopy-paused", "failed") == "postcopy-paused"
            assert refusal(side, "migrate-pause") == PAUSE
        if who == "source":
            words = "Postcopy migration is paused by the user"
            assert srcd.query()["error-desc"] == words
        assert refusal(dstd, "migrate-recover", uri="nope").startswith("unknown migr")
        assert refusal(srcd, "migrate", uri="nope", resume=True).startswith("unknown")
        words = "There's a migration process in progress"
        assert refusal(srcd, "migrate", uri="unix:/nowhere") == words
        assert dstd.execute("query-status")["status"] == "running"


# --- descriptors ----------------------------------------------------------------


class Raw:
    """A QMP connection that sends descriptors along."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")
        self.lines.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, *fds: int, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self.socket.sendmsg([request], rights if fds else [])
        while True:
            reply = json.loads(self.lines.readline())
            if "event" not in reply:
                return reply.get("return", reply.get("error", {}).get("desc"))

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def test_move_over_descriptors(pair: tuple[Source, Destination]) -> None:
    """Both ends get a connection that somebody else made."""
    ends = socket.socketpair()
    for side, end in zip(pair, ends, strict=True):
        raw = Raw(side.qmp_path)
        assert raw.call("getfd", end.fileno(), fdname="link") == {}
        raw.close()  # the descriptor stays
        end.close()
    srcd, dstd = pair
    dstd.execute("migrate-incoming", uri="fd:link")
    assert "socket-address" not in dstd.query()
    link = {"transport": "socket", "type": "fd", "str": "link"}
    srcd.execute("migrate", channels=[{"channel-type": "main", "addr": link}])
    assert srcd.wait_status("completed", "failed") == "completed"
    assert dstd.wait_status("completed", "failed") == "completed"
    assert equal(srcd.directory)


def test_save_into_a_pipe(private_dir: Path) -> None:
    """A pipe has no way back, like a file."""
    with source(private_dir) as srcd:
        srcd.set_capabilities()
        raw = Raw(srcd.qmp_path)
        read, write = os.pipe()
        assert raw.call("getfd", write, fdname="out") == {}
        os.close(write)
        srcd.migrate("fd:out")
        with os.fdopen(read, "rb") as stream:
            assert stream.read().startswith(b"QEVM")
        assert srcd.wait_status("completed", "failed") == "completed"
        raw.close()


def test_descriptors_are_named_and_closed(private_dir: Path) -> None:
    with source(private_dir) as srcd:
        raw = Raw(srcd.qmp_path)
        before = descriptors(srcd)
        none = "No file descriptor supplied via SCM_RIGHTS"
        assert raw.call("getfd", fdname="a") == none
        digit = "Parameter 'fdname' expects a name not starting with a digit"
        assert raw.call("getfd", 0, fdname="5x") == digit
        assert raw.call("getfd", 0, fdname="a") == {}
        assert raw.call("getfd", 0, fdname="a") == {}
        assert descriptors(srcd) == before + 1
        assert raw.call("closefd", fdname="a") == {}
        gone = "File descriptor named 'a' not found"
        assert raw.call("closefd", fdname="a") == gone
        for _ in range(50):
            raw.call("query-name", *[0] * 20)
        assert raw.call("getfd", fdname="b") == {}, "of those that came before"
        raw.close()
        Raw(srcd.qmp_path).close()
        wait_until(lambda: descriptors(srcd) <= before + 1)


def descriptors(side: Source) -> int:
    return len(os.listdir(f"/proc/{side.process.pid}/fd"))


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # another process's descriptors have no events


# --- one parameter, one capability ----------------------------------------------


def test_one_parameter_and_one_capability(pair: tuple[Source, Destination]) -> None:
    for side in pair:
        for value, now in (("10k", 10240), (7, 7), ("1.5G", 3 << 29)):
            side.execute(
                "migrate_set_parameter", parameter="max-bandwidth", value=value
            )
            parameters = side.execute("query-migrate-parameters")
            assert parameters["max-bandwidth"] == now
        side.execute("migrate_set_parameter", **{"downtime-limit": 5})
        assert side.execute("query-migrate-parameters")["downtime-limit"] == 5
        words = "Parameter 'parameter' does not accept value 'bogus'"
        assert (
            refusal(side, "migrate_set_parameter", parameter="bogus", value=1) == words
        )
        words = "Invalid size 10kb"
        given = {"parameter": "max-bandwidth", "value": "10kb"}
        assert refusal(side, "migrate_set_parameter", **given) == words
        words = "Parameter 'downtime-limit' expects uint64"
        given = {"parameter": "downtime-limit", "value": 1.5}
        assert refusal(side, "migrate_set_parameter", **given) == words
        side.execute("migrate_set_capability", capability="return-path", state=True)
        known = side.execute("query-migrate-capabilities")
        assert {"capability": "return-path", "state": True} in known
        words = "Postcopy preempt requires postcopy-ram"
        given = {"capability": "postcopy-preempt", "state": True}
        assert refusal(side, "migrate_set_capability", **given) == words


# --- dirty rate -----------------------------------------------------------------


def measured(side: Source, **arguments: Any) -> dict[str, Any]:
    side.execute("calc-dirty-rate", **arguments)
    assert side.execute("query-dirty-rate")["status"] == "measuring"
    words = "the dirty rate is already being measured."
    assert refusal(side, "calc-dirty-rate", **arguments) == words
    wait_until(lambda: side.execute("query-dirty-rate")["status"] == "measured")
    return side.execute("query-dirty-rate", calc_time_unit="millisecond")


BRIEF = {"calc_time": 300, "calc_time_unit": "millisecond"}


@pytest.mark.userfaultfd
def test_dirty_rate_of_a_guest_that_writes(private_dir: Path) -> None:
    memory = ("--memory", "64M", "--accel", "process")
    words = ("--append", "area=32M write-rate=40M")
    with Source(private_dir, *memory, *words) as srcd:
        srcd.wait_filled()
        report = measured(srcd, **BRIEF)
        assert report["mode"] == "page-sampling"
        assert report["sample-pages"] == 512
        assert report["calc-time"] == 300
        assert report["dirty-rate"] > 0
        report = measured(srcd, mode="dirty-bitmap", **BRIEF)
        assert report["mode"] == "dirty-bitmap"
        assert report["dirty-rate"] > 0
        srcd.execute("stop")
        assert measured(srcd, **BRIEF)["dirty-rate"] == 0


def test_dirty_rate_gives_way_to_a_migration(private_dir: Path) -> None:
    with source(private_dir) as srcd, destination(private_dir) as dstd:
        prepare(srcd, dstd)
        srcd.execute("calc-dirty-rate", calc_time=60)
        srcd.migrate(dstd.listen())
        assert srcd.wait_status("completed", "failed") == "completed"
        assert srcd.execute("query-dirty-rate")["status"] == "unstarted"


def test_dirty_rate_refused(pair: tuple[Source, Destination]) -> None:
    srcd, dstd = pair
    assert srcd.execute("query-dirty-rate") == {
        "status": "unstarted",
        "sample-pages": 0,
        "mode": "page-sampling",
        "calc-time-unit": "second",
        "start-time": 0,
        "calc-time": 0,
    }
    for arguments, words in (
        (
            {"calc_time": 49, "calc_time_unit": "millisecond"},
            "Calculation time is out of range [50ms, 60000ms].",
        ),
        ({"calc_time": 61}, "Calculation time is out of range [50ms, 60000ms]."),
        (
            {"calc_time": 1, "sample_pages": 127},
            "sample-pages is out of range[128, 16384].",
        ),
        (
            {"calc_time": 1, "sample_pages": 500, "mode": "dirty-bitmap"},
            "sample-pages is used only in page-sampling mode",
        ),
        (
            {"calc_time": 1, "mode": "dirty-ring"},
            "mode dirty-ring is not enabled, use other method instead.",
        ),
    ):
        assert refusal(srcd, "calc-dirty-rate", **arguments) == words
    dstd.listen()
    assert "still arriving" in refusal(dstd, "calc-dirty-rate", calc_time=1)


# --- the human monitor ----------------------------------------------------------


def human(side: Any, line: str) -> str:
    return side.execute("human-monitor-command", command_line=line)


def test_a_migration_by_the_human_monitor(pair: tuple[Source, Destination]) -> None:
    srcd, dstd = pair
    assert human(dstd, "info status") == "VM status: paused (inmigrate)\r\n"
    assert human(dstd, "migrate_incoming tcp:127.0.0.1:0") == ""
    shown = human(dstd, "info migrate")
    assert "Migration status: setup\r\ntotal time: 0 ms\r\nsocket address: [" in shown
    uri = shown.split("\t")[1].split("\r")[0]
    assert human(srcd, "migrate_set_parameter max-bandwidth 1G") == ""
    assert human(srcd, f"migrate {uri}") == (
        "terminal does not allow synchronous migration, continuing detached\r\n"
    )
    assert srcd.wait_status("completed", "failed") == "completed"
    assert dstd.wait_status("completed", "failed") == "completed"
    shown = human(srcd, "info migrate")
    assert "Migration status: completed\r\n" in shown
    assert "total ram: 16384 kbytes\r\n" in shown
    assert human(srcd, "info status") == "VM status: paused (postmigrate)\r\n"
    assert human(dstd, "info status") == "VM status: running\r\n"
    assert human(dstd, "stop") == ""
    assert human(dstd, "info status") == "VM status: paused\r\n"


def test_human_refusals(pair: tuple[Source, Destination]) -> None:
    srcd, _ = pair
    assert human(srcd, "migrate_recover unix:/x") == f"Error: {RECOVER}\r\n"
    assert human(srcd, "migrate_pause") == f"Error: {PAUSE}\r\n"
    words = "Error: unknown migration protocol: bogus:\r\n"
    assert human(srcd, "migrate_incoming bogus:") == words
    assert human(srcd, "calc_dirty_rate 1").startswith("Starting dirty rate")
    words = "Error: the dirty rate is already being measured.\r\n"
    assert human(srcd, "calc_dirty_rate 1 500") == words
    words = "Parameter 'cpu-index' expects a CPU number"
    given = {"command_line": "info name", "cpu_index": 1}
    assert refusal(srcd, "human-monitor-command", **given) == words
    version = srcd.execute("query-version")["package"]
    assert human(srcd, "info version") == f"10.0.2{version}\r\n"


# --- the socket -----------------------------------------------------------------


def start(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A daemon that is expected to refuse."""
    words = [str(Path(sys.executable).with_name("srcd")), "serve", *more]
    ram = folder / "ram"
    fill(ram, PAGE)
    return subprocess.run(
        [*words, "--ram", f"ram={ram}"], capture_output=True, text=True, timeout=30
    )


def test_mode_and_group_of_the_socket(private_dir: Path) -> None:
    with source(private_dir, "--qmp-group", "1") as srcd:
        found = srcd.qmp_path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_gid == 1
    refused = start(private_dir, "--qmp", "x", "--qmp-group", "no-such-group")
    assert refused.returncode == 2
    assert "no group is called 'no-such-group'" in refused.stderr


def test_a_folder_of_everybody(private_dir: Path) -> None:
    """Without a sticky bit others may replace the socket: refused."""
    folder = private_dir / "open"
    folder.mkdir()
    folder.chmod(0o777)
    refused = start(private_dir, "--qmp", str(folder / "qmp"))
    assert refused.returncode == 1
    assert "chmod o-w" in refused.stderr
    assert list(folder.iterdir()) == []
    folder.chmod(0o1777)
    with source(private_dir, "--qmp", str(folder / "qmp")) as srcd:
        assert f"everybody may write to {folder}" in srcd.said


def test_a_live_socket_is_not_taken(private_dir: Path) -> None:
    with source(private_dir) as srcd:
        refused = start(private_dir, "--qmp", str(srcd.qmp_path))
        assert refused.returncode == 1
        assert "Another process serves this socket" in refused.stderr
        assert srcd.execute("query-name") == {}
        srcd.process.kill()
        srcd.process.wait()
    assert srcd.qmp_path.exists(), "left behind by a daemon that was killed"
    with source(private_dir) as srcd:
        assert srcd.execute("query-name") == {}


@pytest.mark.userfaultfd
def test_the_guest_is_unharmed_by_all_this(private_dir: Path) -> None:
    """Held, cancelled, measured, held again and moved."""
    memory = ("--memory", "64M", "--accel", "process")
    with (
        Source(private_dir, *memory, "--append", "area=16M write-rate=20M") as srcd,
        Destination(private_dir, *memory) as dstd,
    ):
        prepare(srcd, dstd)
        srcd.set_capabilities("pause-before-switchover")
        before = srcd.wait_filled()
        srcd.migrate(f"file:{private_dir}/stream")
        srcd.wait_status("pre-switchover")
        srcd.execute("migrate_cancel")
        srcd.wait_status("cancelled")
        measured(srcd, mode="dirty-bitmap", **BRIEF)
        srcd.migrate(dstd.listen())
        srcd.wait_status("pre-switchover")
        srcd.execute("migrate-continue", state="pre-switchover")
        assert srcd.wait_status("completed", "failed") == "completed", srcd.query()
        assert dstd.wait_status("completed", "failed") == "completed"
        assert_unharmed(dstd, before)
