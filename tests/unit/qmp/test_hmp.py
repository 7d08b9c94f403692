"""The human monitor; every line was compared with QEMU 10."""

from __future__ import annotations

from typing import Any

import pytest

from common.qmp.hmp import LINES, HumanMonitor
from common.qmp.hmp_info import INFOS
from common.qmp.session import CommandError

GLOBALS = 7  # lines in front of `info migrate`


class Daemon:
    """Handlers that note what they are asked, and answer what they are told."""

    def __init__(self, **replies: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.replies = replies
        names = [
            *("migrate", "migrate-incoming", "migrate-recover", "migrate-pause"),
            *("migrate_cancel", "migrate-continue", "migrate-start-postcopy"),
            *("migrate-set-capabilities", "migrate_set_parameter", "stop", "cont"),
            *("calc-dirty-rate", "query-migrate", "query-name", "query-status"),
            *("quit", "query-dirty-rate", "getfd", "closefd", "pmemsave"),
        ]
        handlers = {name: self._handler(name) for name in names}
        self.monitor = HumanMonitor(handlers, check_uri=self.check_uri)
        self.monitor.version = {
            "qemu": {"major": 10, "minor": 0, "micro": 2},
            "package": " x",
        }

    def check_uri(self, uri: str) -> None:
        if uri == "bad:":
            raise CommandError("unknown migration protocol: bad:")

    def _handler(self, name: str) -> Any:
        async def handler(arguments: dict[str, Any]) -> Any:
            self.asked.append((name, arguments))
            reply = self.replies.get(name.replace("-", "_"))
            if isinstance(reply, str):
                raise CommandError(reply)
            return reply

        return handler

    async def lines(self, text: str) -> list[str]:
        said = await self.monitor.run(text)
        assert said == "" or said.endswith("\r\n")
        return said.split("\r\n")[:-1]


def tried(words: str, name: str) -> list[str]:
    return [words, f'Try "help {name}" for more information']


@pytest.mark.parametrize(
    ("text", "command", "arguments"),
    [
        ("migrate -d tcp:h:1", "migrate", {"uri": "tcp:h:1", "resume": False}),
        ("migrate -r -d  x:", "migrate", {"uri": "x:", "resume": True}),
        (
            "migrate_incoming x:",
            "migrate-incoming",
            {"uri": "x:", "exit-on-error": False},
        ),
        ('migrate_recover "a \\"b\\n"', "migrate-recover", {"uri": 'a "b\n'}),
        (" migrate_pause ", "migrate-pause", {}),
        ("migrate_continue device", "migrate-continue", {"state": "device"}),
        (
            "migrate_set_capability events on",
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "events", "state": True}]},
        ),
        (
            "migrate_set_parameter max-bandwidth 10k",
            "migrate_set_parameter",
            {"parameter": "max-bandwidth", "value": "10k"},
        ),
        (
            'migrate_set_parameter tls-creds ""',
            "migrate_set_parameter",
            {"parameter": "tls-creds", "value": ""},
        ),
        ("s", "stop", {}),
        ("c", "cont", {}),
        ("getfd a", "getfd", {"fdname": "a"}),
        (
            "pmemsave 0x1000 16 f",
            "pmemsave",
            {"val": 4096, "size": 16, "filename": "f"},
        ),
    ],
)
async def test_a_line_is_a_command(
    text: str, command: str, arguments: dict[str, Any]
) -> None:
    daemon = Daemon()
    assert await daemon.lines(text) == []
    assert daemon.asked == [(command, arguments)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", []),
        ("   ", []),
        ("bogus", ["unknown command: 'bogus'"]),
        ("info bogus", ["unknown command: 'info bogus'"]),
        ("help bogus", ["unknown command: 'bogus'"]),
        ("migrate", tried("migrate: string expected", "migrate")),
        ("migrate -d -r", tried("migrate: string expected", "migrate")),
        ("migrate -z", tried("migrate: unsupported option -z", "migrate")),
        (
            "migrate -dr tcp:h:1",
            tried("migrate: extraneous characters at the end of line", "migrate"),
        ),
        (
            "stop x",
            tried("stop|s: extraneous characters at the end of line", "stop"),
        ),
        (
            "migrate_set_capability events true",
            tried("Expected 'on' or 'off'", "migrate_set_capability"),
        ),
        (
            "migrate_set_capability bogus",
            tried("Expected 'on' or 'off'", "migrate_set_capability"),
        ),
        (
            "migrate_set_capability bogus on",
            ["Error: invalid parameter value: bogus"],
        ),
        ("migrate_set_parameter bogus 1", ["Error: invalid parameter value: bogus"]),
        ("migrate_continue bogus", ["Error: invalid parameter value: bogus"]),
        ("migrate -d bad:", ["Error: unknown migration protocol: bad:"]),
        ("migrate_incoming bad:", ["Error: unknown migration protocol: bad:"]),
        (
            "calc_dirty_rate",
            tried("unexpected end of expression", "calc_dirty_rate"),
        ),
        (
            "calc_dirty_rate x",
            tried("invalid char 'x' in expression", "calc_dirty_rate"),
        ),
        ('migrate_recover "x', tried("unterminated string literal", "migrate_recover")),
    ],
)
async def test_refused(text: str, said: list[str]) -> None:
    daemon = Daemon()
    assert await daemon.lines(text) == said
    assert daemon.asked == []


async def test_an_error_is_printed() -> None:
    daemon = Daemon(migrate_pause="not now")
    assert await daemon.lines("migrate_pause") == ["Error: not now"]
    words = "Parameter 'downtime-limit' expects a non-negative number below 2^64"
    said = await Daemon(migrate_set_parameter=words).lines(
        "migrate_set_parameter downtime-limit x"
    )
    assert said == [
        f"Error: {words}",
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
        "and exabytes, respectively.",
    ]


async def test_what_migrate_and_calc_dirty_rate_say() -> None:
    daemon = Daemon()
    assert await daemon.lines("migrate x:") == [
        "terminal does not allow synchronous migration, continuing detached"
    ]
    assert await daemon.lines("calc_dirty_rate -b 2") == [
        "Starting dirty rate measurement with period 2 seconds",
        "[Please use 'info dirty_rate' to check results]",
    ]
    order = {"calc-time": 2, "mode": "dirty-bitmap"}
    assert daemon.asked[-1] == ("calc-dirty-rate", order)


async def test_info_migrate() -> None:
    ram = {
        "transferred": 2048,
        "mbps": 1.234,
        "remaining": 0,
        "total": 1 << 20,
        "duplicate": 3,
        "normal": 4,
        "normal-bytes": 16384,
        "dirty-sync-count": 2,
        "page-size": 4096,
        "multifd-bytes": 0,
        "pages-per-second": 5,
        "dirty-pages-rate": 0,
        "postcopy-requests": 6,
        "precopy-bytes": 1024,
        "downtime-bytes": 0,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }
    info = {"status": "active", "total-time": 9, "setup-time": 1, "ram": ram}
    said = await Daemon(query_migrate=info).lines("info migrate")
    assert said[GLOBALS:] == [
        "Migration status: active",
        "total time: 9 ms",
        "setup: 1 ms",
        "transferred ram: 2 kbytes",
        "throughput: 1.23 mbps",
        "remaining ram: 0 kbytes",
        "total ram: 1024 kbytes",
        "duplicate: 3 pages",
        "normal: 4 pages",
        "normal bytes: 16 kbytes",
        "dirty sync count: 2",
        "page size: 4 kbytes",
        "multifd bytes: 0 kbytes",
        "pages-per-second: 5",
        "postcopy request count: 6",
        "precopy ram: 1 kbytes",
    ]
    assert len(await Daemon(query_migrate={}).lines("info migrate")) == GLOBALS
    failed = {"status": "failed", "error-desc": "no way"}
    said = await Daemon(query_migrate=failed).lines("info migrate")
    assert said[GLOBALS] == "Migration status: failed (no way)"
    listening = {
        "status": "postcopy-active",
        "postcopy-blocktime": 5,
        "postcopy-vcpu-blocktime": [5, 3],
        "socket-address": [
            {"type": "inet", "host": "::1", "port": "1", "ipv6": True},
            {"type": "unix", "path": "/p"},
            {"type": "vsock", "cid": "2", "port": "3"},
        ],
    }
    said = await Daemon(query_migrate=listening).lines("info migrate")
    assert said[GLOBALS + 2 :] == [
        "postcopy blocktime: 5",
        "postcopy vcpu blocktime: 5,3",
        "socket address: [",
        "\ttcp:[::1]:1",
        "\tunix:/p",
        "\tvsock:2:3",
        "]",
    ]


async def test_other_infos() -> None:
    rate = {
        "status": "measured",
        "start-time": 7,
        "sample-pages": 512,
        "calc-time": 1,
        "mode": "page-sampling",
        "dirty-rate": 12,
    }
    daemon = Daemon(
        query_name={"name": "vm"},
        query_status={"status": "prelaunch", "running": False},
        query_dirty_rate=rate,
    )
    assert await daemon.lines("info name") == ["vm"]
    assert await daemon.lines("info status") == ["VM status: paused (prelaunch)"]
    assert await daemon.lines("info version") == ["10.0.2 x"]
    assert await daemon.lines("info dirty_rate") == [
        "Status: measured",
        "Start Time: 7 (ms)",
        "Sample Pages: 512 (per GB)",
        "Period: 1 (sec)",
        "Mode: page-sampling",
        "Dirty rate: 12 (MB/s)",
    ]
    assert await Daemon(query_name={}).lines("info name") == []


async def test_help_is_what_completion_is_built_from() -> None:
    daemon = Daemon()
    said = await daemon.lines("help")
    assert [line.split()[0] for line in said] == sorted(
        line.split()[0] for line in said
    )
    assert {name for line in said for name in line.split()[0].split("|")} == {
        *LINES,
        "info",
    }
    for line in await daemon.lines("help info"):
        assert line.split()[0] == "info"
        assert line.split()[1] in INFOS
    assert await daemon.lines("info") == await daemon.lines("help info")
    assert await daemon.lines("? s") == ["stop|s  -- stop the guest"]
    for name in LINES:
        assert len(await daemon.lines(f"help {name}")) == 1


async def test_cpu_index() -> None:
    monitor = Daemon().monitor
    assert await monitor.command({"command-line": "", "cpu-index": 0}) == ""
    for index in (-1, 1):
        with pytest.raises(CommandError, match="expects a CPU number"):
            await monitor.command({"command-line": "", "cpu-index": index})
