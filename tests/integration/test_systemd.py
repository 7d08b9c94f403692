"""The daemons as services: notifications, sockets, units, checks, installing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import installed
from support.daemons import Destination, Source, assert_unharmed
from support.installed import Host

from common.qmp.client import QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
ACTIVATE = ROOT / "tests" / "support" / "activate.py"
BIN = Path(sys.executable).parent
PATIENCE = 60.0  # seconds


# --- a manager of our own -------------------------------------------------------


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


# --- can this host migrate? -----------------------------------------------------


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.userfaultfd
@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_this_machine_can(program: str) -> None:
    done = run(BIN / program, "check")
    assert done.returncode == 0, done.stdout
    assert "OK    userfaultfd: permitted through " in done.stdout
    assert "0 FAIL" in done.stdout.splitlines()[-1]


# No capability at all, and in place of each device one that nobody may open.
BARE = """
mount -t tmpfs tmpfs "$1"
for device in userfaultfd kvm cpu_dma_latency; do
    mknod "$1/$device" c 10 1
    chmod 0 "$1/$device"
    [ ! -e "/dev/$device" ] || mount --bind "$1/$device" "/dev/$device"
done
shift
exec setpriv --bounding-set=-all --inh-caps=-all "$@"
"""


def bare(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run("unshare", "--mount", "sh", "-euc", BARE, "sh", folder, *words)


@pytest.mark.netns
@pytest.mark.userfaultfd
def test_rights_taken_away(private_dir: Path) -> None:
    done = bare(private_dir, BIN / "dstd", "check")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (line,) = [one for one in lines if " userfaultfd: " in one]
    assert line.startswith("FAIL  userfaultfd: not permitted, and postcopy needs it: ")
    if Path("/dev/userfaultfd").exists():
        assert "/dev/userfaultfd is not for this user (c--------- root root)" in line
    assert "vm.unprivileged_userfaultfd is 0; CAP_SYS_PTRACE is missing; " in line
    assert "any one of: let this user open /dev/userfaultfd" in line
    assert any(one.startswith("WARN  /dev/kvm: ") for one in lines)
    assert any(one.startswith("WARN  processors stay awake: ") for one in lines)
    assert lines[-1] == "this host cannot take guests in: 1 FAIL, 2 WARN"


@pytest.mark.netns
@pytest.mark.userfaultfd
def test_a_source_without_rights_is_only_slow(private_dir: Path) -> None:
    done = bare(private_dir, BIN / "srcd", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN  userfaultfd: not permitted, and without it every page" in done.stdout


@pytest.mark.netns
def test_no_devices_at_all(private_dir: Path) -> None:
    """As PrivateDevices=yes has it; the capability helps."""
    script = 'mount -t tmpfs tmpfs /dev; exec "$@"'
    done = run("unshare", "--mount", "sh", "-euc", script, "sh", BIN / "dstd", "check")
    assert "OK    userfaultfd: permitted through the system call: " in done.stdout
    assert "WARN  /dev/kvm: No such file or directory; " in done.stdout


def test_a_configuration_that_asks_too_much(private_dir: Path) -> None:
    config = private_dir / "c.toml"
    config.write_text('memory = "1000000G"\n')
    assert run(BIN / "dstd", "check-config", config).stdout == f"{config}: OK\n"
    done = run(BIN / "dstd", "check", "--config", config)
    assert done.returncode == 1
    assert "FAIL  memory: " in done.stdout
    assert "; free memory, or move a smaller guest" in done.stdout


def test_a_configuration_that_is_wrong(private_dir: Path) -> None:
    config = private_dir / "c.toml"
    config.write_text('memmory = "1G"\n')
    done = run(BIN / "dstd", "check-config", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{config}: Parameter 'memmory' is unexpected; did you mean" in done.stderr


# --- what is installed ----------------------------------------------------------


@pytest.fixture(scope="module")
def destination(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    installed.make("install", folder)
    return folder


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


UNITS = ("srcd@vm.service", "dstd@vm.service", "postcopyd-guest@vm.service")
SOCKETS = ("srcd@vm.socket", "dstd@vm.socket")
EXPECTED = {
    *("usr/bin/srcd", "usr/bin/dstd", "usr/bin/postcopyd-microvm"),
    *("usr/lib/systemd/system/srcd@.service", "usr/lib/systemd/system/srcd@.socket"),
    *("usr/lib/systemd/system/dstd@.service", "usr/lib/systemd/system/dstd@.socket"),
    "usr/lib/systemd/system/postcopyd-guest@.service",
    "usr/lib/sysusers.d/postcopyd.conf",
    "usr/lib/tmpfiles.d/postcopyd.conf",
    "usr/lib/udev/rules.d/70-postcopyd.rules",
    "usr/share/doc/postcopyd/operations.md",
    "usr/share/doc/postcopyd/examples/dstd.toml",
}


@pytest.mark.systemd
def test_installed(destination: Path) -> None:
    found = files_below(destination)
    assert found >= EXPECTED
    told = [
        path
        for path in destination.rglob("*")
        if path.is_file() and str(destination).encode() in path.read_bytes()
    ]
    assert told == []  # nobody knows where it was put together
    links = [path for path in (destination / "usr/bin").iterdir()]
    for link in links:
        assert (destination / os.readlink(link).lstrip("/")).exists(), link


@pytest.mark.systemd
def test_uninstalling_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/other").touch()
    (tmp_path / "etc/postcopyd").mkdir(parents=True)
    (tmp_path / "etc/postcopyd/vm.toml").touch()
    before = files_below(tmp_path)
    installed.make("install", tmp_path)
    assert files_below(tmp_path) >= EXPECTED
    installed.make("uninstall", tmp_path)
    assert files_below(tmp_path) == before


@pytest.mark.systemd
@pytest.mark.parametrize("target", ["install", "uninstall"])
@pytest.mark.parametrize("prefix", ["/usr/lib", "/", "lib", "."])
def test_what_is_not_ours_is_not_emptied(
    target: str, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "usr/lib/other").mkdir(parents=True)
    before = files_below(tmp_path)
    done = installed.run_make(target, tmp_path, prefix)
    assert done.returncode != 0
    assert "PREFIX must be a folder for the daemons alone" in done.stderr
    assert files_below(tmp_path) == before


@pytest.mark.systemd
def test_another_prefix(tmp_path: Path) -> None:
    installed.make("install", tmp_path, "/opt/x/postcopyd")
    assert os.readlink(tmp_path / "usr/bin/srcd") == "/opt/x/postcopyd/bin/srcd"
    installed.make("uninstall", tmp_path, "/opt/x/postcopyd")
    assert files_below(tmp_path) == set()


@pytest.mark.systemd
def test_examples_are_right(destination: Path) -> None:
    examples = destination / "usr/share/doc/postcopyd/examples"
    for program in ("srcd", "dstd"):
        done = run(BIN / program, "check-config", examples / f"{program}.toml")
        assert done.returncode == 0, done.stderr


OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_files_of_the_document_are_right(program: str, private_dir: Path) -> None:
    shown = re.findall(r"^```toml\n(.*?)^```$", OPERATIONS, re.M | re.S)
    path = private_dir / "c.toml"
    path.write_text(dict(zip(("srcd", "dstd"), shown, strict=True))[program])
    done = run(BIN / program, "check-config", path)
    assert done.returncode == 0, done.stderr


def test_the_document_explains_what_check_says() -> None:
    told = re.findall(r"^\| `([^`]+)` \|", OPERATIONS, re.M)
    for program in ("srcd", "dstd"):
        lines = run(BIN / program, "check").stdout.splitlines()[:-1]
        needs = [line[6:].partition(": ")[0] for line in lines]
        assert len(needs) > 5
        for need in needs:
            words = (need, f"{need.partition(' (')[0]} (…)")
            assert any(word in told for word in words), need


@pytest.mark.systemd
@pytest.mark.parametrize("unit", [*UNITS, *SOCKETS])
def test_units_are_understood(unit: str, destination: Path, tmp_path: Path) -> None:
    """It ends with status 0 whatever it finds; what it prints counts."""
    root = tmp_path / "root"
    shutil.copytree(destination, root, symlinks=True)
    # What the host has besides: its own units, and kill.
    theirs = SYSTEMD_UNITS.resolve()
    for path in theirs.iterdir():
        if path.is_file() and path.suffix in (".target", ".slice", ".mount"):
            shutil.copy(path, root / "usr/lib/systemd/system")
    (root / "bin").mkdir()
    (root / "bin/kill").write_text("#!/bin/sh\n")
    (root / "bin/kill").chmod(0o755)
    for link in (root / "usr/bin").iterdir():
        target = os.readlink(link)
        link.unlink()
        link.symlink_to(f"../..{target}")
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", unit)
    assert (done.stdout, done.stderr) == ("", "")


SYSTEMD_UNITS = Path("/lib/systemd/system")


@pytest.mark.systemd
@pytest.mark.parametrize("unit", ["srcd@", "dstd@", "postcopyd-guest@"])
def test_sandboxes_are_tight(unit: str, destination: Path) -> None:
    path = destination / f"usr/lib/systemd/system/{unit}.service"
    words = ["security", "--offline=true", "--threshold=20", "--no-pager"]
    done = run("systemd-analyze", *words, path)
    assert done.returncode == 0, done.stdout


# --- a real systemd -------------------------------------------------------------

RUN = "/run/postcopyd"
# There is no journal to look into when a test has failed.
LOGGED = f"[Service]\nStandardError=append:{RUN}/log\n"
QUICK = f"{LOGGED}WatchdogSec=1\n"


def unit_files(name: str, options: str) -> dict[str, str]:
    return {
        f"{name}.toml": f'name = "vm"\nguest = "{RUN}/{name}.guest"\n',
        f"{name}.guest": f'OPTIONS="--memory 64M {options}"\n',
    }


GUEST = "--kernel /usr/share/postcopyd/test-guest.elf --append area=16M"


class Unit:
    """Makes a daemon of tests.support speak to one that a host's systemd runs."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.unit = f"{self.program}@{name}.service"
        self.directory = host.path(RUN)
        self.statuses: list[str] = []
        self.qmp = self.connect()

    def connect(self) -> QmpClient:
        instance = self.unit.removesuffix(".service").replace("@", "-")
        return QmpClient(self.directory / f"{instance}.qmp", timeout=PATIENCE)

    def report(self) -> Any:
        """As the daemon sees its folder, and as the test does."""
        from support.report import REPORT_ADDRESS, REPORT_SIZE, Report

        path = f"{RUN}/report"
        place = {"val": REPORT_ADDRESS, "size": REPORT_SIZE, "filename": path}
        self.qmp.execute("pmemsave", place)
        return Report.parse(self.host.path(path).read_bytes())


class SourceUnit(Unit, Source):
    pass


class DestinationUnit(Unit, Destination):
    pass


@contextmanager
def a_host(destination: Path, folder: Path, guest: str = GUEST) -> Iterator[Host]:
    files = unit_files("here", guest) | unit_files("there", "--incoming")
    logged = ("dstd@there", "postcopyd-guest@here", "postcopyd-guest@there")
    drop_ins = {f"{unit}.service": LOGGED for unit in logged}
    drop_ins["srcd@here.service"] = QUICK
    with Host(destination, folder, files, drop_ins) as host:
        try:
            yield host
        finally:
            print(host.log, host.run("cat", f"{RUN}/log").stdout)


def started(host: Host, units: Sequence[str]) -> None:
    host.systemctl("start", *units)
    for unit in units:
        assert host.show(unit, "ActiveState") == "active"


@pytest.mark.systemd
@pytest.mark.systemd_boots
@pytest.mark.userfaultfd
def test_services_move_a_guest(destination: Path, private_dir: Path) -> None:
    """Under everything that the units forbid, by postcopy, as their user."""
    with a_host(destination, private_dir) as host:
        host.systemctl("start", "srcd@here.socket", "dstd@there.socket")
        for name in ("here", "there"):
            host.systemctl("start", f"postcopyd-guest@{name}.service")
        # It is the clients that start the daemons.
        src, dst = SourceUnit(host, "here"), DestinationUnit(host, "there")
        with src.qmp, dst.qmp:
            before = src.wait_report(lambda r: r.filled and r.checked > 0)
            for side in (src, dst):
                side.set_capabilities("postcopy-ram", "postcopy-preempt")
                assert host.show(side.unit, "User") == "postcopyd"
            src.set_parameters(max_bandwidth=1 << 20)
            src.migrate(dst.listen())
            src.wait_status("active")
            src.execute("migrate-start-postcopy")
            assert src.wait_status("completed", "failed") == "completed", src.query()
            assert dst.wait_status("completed", "failed") == "completed", dst.query()
            assert_unharmed(dst, before)
            assert dst.ours["postcopy-pages"] > 0
            assert dst.ours["way"] == "continue"
            host.wait(src.unit, "StatusText", "completed: 100 % of 64 MiB")
            src.execute("quit")
        # A guest that has moved does not come back with its daemon.
        host.systemctl("stop", "postcopyd-guest@here.service")
        host.systemctl("restart", "--no-block", src.unit)
        host.wait(src.unit, "StatusText", "waiting for a guest to attach")
        assert host.show("postcopyd-guest@here.service", "ActiveState") == "inactive"


@pytest.mark.systemd
@pytest.mark.systemd_boots
@pytest.mark.userfaultfd
@pytest.mark.parametrize("blow", ["KILL", "STOP"])
def test_a_guest_outlives_its_daemon(
    destination: Path, private_dir: Path, blow: str
) -> None:
    """Killed, or hanging until the watchdog finds out; the next one takes over."""
    guest, daemon = "postcopyd-guest@here.service", "srcd@here.service"
    with a_host(destination, private_dir) as host:
        started(host, [daemon, guest])
        first = host.show(daemon, "MainPID")
        process = host.show(guest, "MainPID")
        src = SourceUnit(host, "here")
        with src.qmp:
            before = src.wait_report(lambda r: r.filled and r.checked > 0)
        assert host.run("kill", f"-{blow}", first).returncode == 0
        host.wait(daemon, "NRestarts", "1")
        host.wait(daemon, "ActiveState", "active")
        assert host.show(daemon, "MainPID") != first
        with SourceUnit(host, "here").qmp as client:
            assert client.execute("query-status")["running"]
        again = SourceUnit(host, "here")
        with again.qmp:
            assert_unharmed(again, before)
        assert host.show(guest, "MainPID") == process


@pytest.mark.systemd
@pytest.mark.systemd_boots
def test_the_manager_keeps_what_no_guest_can(
    destination: Path, private_dir: Path
) -> None:
    """RAM without a process: what is known of it is in the descriptor store."""
    names = ("here", "there")
    files = {
        f"{name}.toml": f'ram = ["ram={RUN}/{name}.ram,size=16M"]\n' for name in names
    }
    units = [f"srcd@{names[0]}.service", f"dstd@{names[1]}.service"]
    with Host(destination, private_dir, files, dict.fromkeys(units, LOGGED)) as host:
        content = os.urandom(16 << 20)
        ram = host.path(f"{RUN}/here.ram")
        ram.write_bytes(content)
        ram.chmod(0o666)
        started(host, units)
        src, dst = SourceUnit(host, "here"), DestinationUnit(host, "there")
        with src.qmp, dst.qmp:
            for side in (src, dst):
                side.set_capabilities("postcopy-ram")
            src.set_parameters(max_bandwidth=1 << 20, max_postcopy_bandwidth=1 << 20)
            src.migrate(dst.listen())
            src.wait_status("active")
            src.execute("migrate-start-postcopy")
            for side in (src, dst):
                side.wait_status("postcopy-active")
            first = dst.ours["postcopy-pages"]
        for unit in units:
            host.run("kill", "-KILL", host.show(unit, "MainPID"))
        for unit in units:
            host.wait(unit, "NRestarts", "1")
            host.wait(unit, "ActiveState", "active")
        src, dst = SourceUnit(host, "here"), DestinationUnit(host, "there")
        with src.qmp, dst.qmp:
            for side in (src, dst):
                assert side.query()["status"] == "postcopy-paused"
            (place,) = dst.query()["socket-address"]
            src.set_parameters(max_postcopy_bandwidth=0)
            uri = f"tcp:{place['host']}:{place['port']}"
            src.execute("migrate", uri=uri, resume=True)
            for side in (src, dst):
                side.wait_status("completed")
            assert dst.ours["postcopy-pages"] + first <= 4096
            assert dst.ours["duplicate-pages"] == 0
        assert host.path(f"{RUN}/there.ram").read_bytes() == content


@pytest.mark.systemd
@pytest.mark.systemd_boots
def test_a_wrong_file_is_not_tried_again(destination: Path, private_dir: Path) -> None:
    files = {"vm.toml": 'memmory = "1G"\n'}
    unit = "dstd@vm.service"
    with Host(destination, private_dir, files, {}) as host:
        assert host.run("systemctl", "start", unit).returncode != 0
        assert host.show(unit, "ExecMainStatus") == "2"
        assert host.show(unit, "NRestarts") == "0"


@pytest.mark.systemd
@pytest.mark.systemd_boots
@pytest.mark.userfaultfd
def test_the_services_user_can_migrate(destination: Path, private_dir: Path) -> None:
    """As the udev rules and sysusers have it."""
    with Host(destination, private_dir, {}, {}) as host:
        for program in ("srcd", "dstd"):
            done = host.run("runuser", "-u", "postcopyd", "--", program, "check")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "OK    userfaultfd: permitted through /dev/userf" in done.stdout
            assert "OK    processors stay awake: " in done.stdout
