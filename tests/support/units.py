"""The daemons and their guests as units of a systemd, driven over QMP.

    with a_host(destination, folder) as host:
        started(host, ["srcd@here.service", "postcopyd-guest@here.service"])
        src = SourceUnit(host, "here")
        with src.qmp:
            src.wait_report(lambda r: r.filled)

`destination` is where `make install` has put everything. The host has a source
`here` and a destination `there`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.qmp.client import QmpClient
from support.daemons import Destination, Source
from support.installed import PATIENCE, Host
from support.report import REPORT_ADDRESS, REPORT_SIZE, Report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

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
    """Makes a daemon of support.daemons speak to one that a host's systemd runs."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.unit = f"{self.program}@{name}.service"
        self.directory = host.path(RUN)
        self.statuses: list[str] = []
        self.qmp = self.connect()

    def connect(self) -> QmpClient:
        instance = self.unit.removesuffix(".service").replace("@", "-")
        return QmpClient(self.directory / f"{instance}.qmp", timeout=PATIENCE)

    def report(self) -> Report:
        """As the daemon sees its folder, and as the test does."""
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
