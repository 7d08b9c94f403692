"""A real systemd runs the daemons from what is installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.daemons import assert_unharmed
from support.installed import Host
from support.units import LOGGED, RUN, DestinationUnit, SourceUnit, a_host, started

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.systemd, pytest.mark.systemd_boots]


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


def test_a_wrong_file_is_not_tried_again(destination: Path, private_dir: Path) -> None:
    files = {"vm.toml": 'memmory = "1G"\n'}
    unit = "dstd@vm.service"
    with Host(destination, private_dir, files, {}) as host:
        assert host.run("systemctl", "start", unit).returncode != 0
        assert host.show(unit, "ExecMainStatus") == "2"
        assert host.show(unit, "NRestarts") == "0"


@pytest.mark.userfaultfd
def test_the_services_user_can_migrate(destination: Path, private_dir: Path) -> None:
    """As the udev rules and sysusers have it."""
    with Host(destination, private_dir, {}, {}) as host:
        for program in ("srcd", "dstd"):
            done = host.run("runuser", "-u", "postcopyd", "--", program, "check")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "OK    userfaultfd: permitted through /dev/userf" in done.stdout
            assert "OK    processors stay awake: " in done.stdout
