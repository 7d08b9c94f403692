"""Arguments of every command: missing, extra, and of each wrong type."""

from __future__ import annotations

from itertools import chain

from support.exchanges import calls

SOURCE = ("source",)
DESTINATION = ("destination",)

WRONG = (None, True, 0, -1, 1.5, "x", [], {})  # one of each JSON type

WITHOUT_ARGUMENTS = (
    "query-version", "query-commands", "query-qmp-schema", "query-name", "query-uuid",
    "query-status", "stop", "cont", "quit", "migrate-start-postcopy", "migrate_cancel",
    "migrate-pause", "query-migrate-capabilities", "query-migrate-parameters",
    "query-migrate",
)  # fmt: skip


def channel(**address):
    return {"channels": [{"channel-type": "main", "addr": address}]}


INET = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}
UNIX = {"transport": "socket", "type": "unix", "path": "/nowhere"}

# Every one of these is refused, by `migrate` and `migrate-incoming` alike.
REFUSED_ADDRESSES = [
    {},
    {"channels": []},
    {"uri": "tcp:127.0.0.1:1", **channel(**UNIX)},
    *({"uri": value} for value in WRONG if not isinstance(value, str)),
    *({"channels": value} for value in WRONG if not isinstance(value, list)),
    {"uri": ""},
    {"uri": "x"},
    {"uri": ":"},
    {"uri": "defer"},
    {"uri": "TCP:127.0.0.1:1"},
    {"uri": " tcp:127.0.0.1:1"},
    {"uri": "tcp"},
    {"uri": "tcp:"},
    {"uri": "tcp:host"},
    {"uri": "tcp:host:"},
    {"uri": "tcp:[::1:1"},
    {"uri": "unix:"},
    {"uri": "fd:"},
    {"uri": "vsock:"},
    {"uri": "vsock:x"},
    {"uri": "file:/nowhere/x,offset=abc"},
    {"uri": "file:/nowhere/x,offset=-1"},
    {"uri": "file:/nowhere/x,offset="},
    {"uri": "nope:\u00e4"},
    *({"channels": [value]} for value in WRONG if not isinstance(value, dict)),
    {"channels": [{}]},
    {"channels": [{"channel-type": "main"}]},
    {"channels": [{"addr": UNIX}]},
    {"channels": [{"channel-type": "nope", "addr": UNIX}]},
    {"channels": [{"channel-type": 1, "addr": UNIX}]},
    {"channels": [{"channel-type": None, "addr": UNIX}]},
    {"channels": [{"channel-type": "main", "addr": UNIX, "x": 1}]},
    {"channels": [{"channel-type": "main", "addr": None}]},
    {"channels": [{"channel-type": "main", "addr": "tcp:127.0.0.1:1"}]},
    {"channels": [*channel(**UNIX)["channels"], {}]},
    {"channels": channel(**UNIX)["channels"] * 2},
    channel(),
    channel(transport="nope"),
    channel(transport=None),
    channel(transport=1),
    channel(transport=["socket"]),
    channel(transport="socket"),
    channel(transport="socket", type="nope"),
    channel(transport="socket", type=1),
    channel(transport="socket", type="inet"),
    channel(transport="socket", type="inet", host="h"),
    channel(**INET | {"port": 1}),
    channel(**INET | {"host": 1}),
    channel(**INET | {"host": None}),
    channel(**INET | {"path": "/x"}),
    channel(**INET, to="1"),
    channel(**INET, to=-1),
    channel(**INET, to=65536),
    channel(**INET, to=1.5),
    channel(**INET, ipv4="on"),
    channel(**INET, ipv6=1),
    channel(**INET, numeric=None),
    channel(**INET, mptcp=0),
    channel(**INET | {"keep-alive": "yes"}),
    channel(**INET, x=1),
    channel(transport="socket", type="unix"),
    channel(**UNIX | {"path": 1}),
    channel(**UNIX, abstract=1),
    channel(**UNIX, tight="on"),
    channel(**UNIX, host="h"),
    channel(transport="socket", type="fd"),
    channel(transport="socket", type="fd", str=3),
    channel(transport="socket", type="vsock"),
    channel(transport="socket", type="vsock", cid="1"),
    channel(transport="socket", type="vsock", cid=1, port="1"),
    channel(transport="exec"),
    channel(transport="exec", args="true"),
    channel(transport="exec", args=None),
    channel(transport="exec", args=[1]),
    channel(transport="exec", args=["true", None]),
    channel(transport="exec", args=["true"], x=1),
    channel(transport="file"),
    channel(transport="file", filename="/nowhere/x"),
    channel(transport="file", filename="/nowhere/x", offset="0"),
    channel(transport="file", filename="/nowhere/x", offset=1.0),
    channel(transport="file", filename=1, offset=0),
    channel(transport="rdma"),
    channel(transport="rdma", host="h"),
    channel(transport="rdma", host="h", port=1),
]

MIGRATE = [
    *calls("migrate", *REFUSED_ADDRESSES, ends=SOURCE),
    *calls(
        "migrate",
        *({"uri": "tcp:127.0.0.1:1", "detach": v} for v in WRONG if v is not True),
        *({"uri": "tcp:127.0.0.1:1", "resume": v} for v in WRONG if v is not True),
        {"uri": "tcp:127.0.0.1:1", "resume": True},
        {"resume": True},
        {"uri": "tcp:127.0.0.1:1", "blk": False},
        {"uri": "tcp:127.0.0.1:1", "inc": False},
        {"uri": "tcp:127.0.0.1:1", "x": None},
        {"uri": 1, "x": None},
        {"URI": "tcp:127.0.0.1:1"},
        ends=SOURCE,
    ),
    # Where a migration is awaited none can be begun.
    *calls("migrate", {}, {"uri": "x"}, {"uri": 1}, {"uri": "unix:/nowhere"},
           {"uri": "unix:/nowhere", "resume": True}, {"channels": []},
           channel(**UNIX), channel(transport="nope"), ends=DESTINATION),
]  # fmt: skip

MIGRATE_INCOMING = [
    *calls("migrate-incoming", *REFUSED_ADDRESSES, ends=DESTINATION),
    *calls(
        "migrate-incoming",
        *({"uri": "x", "exit-on-error": v} for v in WRONG if v is not True),
        {"uri": "x", "exit-on-error": False},
        {"uri": "x", "resume": True},
        {"uri": "x", "detach": True},
        ends=DESTINATION,
    ),
    *calls("migrate-incoming", {}, {"uri": "x"}, {"uri": 1}, {"uri": "unix:/nowhere/x"},
           {"channels": []}, channel(**UNIX), {"x": 1}, ends=SOURCE),
]  # fmt: skip

OTHERS = [
    *chain.from_iterable(
        calls(command, {"x": 1}, {"uri": "x"}) for command in WITHOUT_ARGUMENTS
    ),
    *calls("migrate-continue", {}, {"x": 1}, {"state": "none", "x": 1},
           *({"state": value} for value in WRONG), {"state": "Active"},
           {"state": "none"}, {"state": "active"}, {"state": "pre-switchover"},
           {"state": "postcopy-recover-setup"}),
    *calls("migrate-recover", {}, {"x": 1}, *({"uri": value} for value in WRONG),
           {"uri": "unix:/nowhere/x"}, {"uri": "unix:/x", "x": 1}),
    *calls("migrate-pause", {}),
    *calls("migrate-start-postcopy", {}),
    *calls("migrate_cancel", {}),
    *calls("query-dirty-rate", {}, {"x": 1},
           *({"calc-time-unit": value} for value in WRONG),
           {"calc-time-unit": "second"}, {"calc-time-unit": "millisecond"}),
    *calls("calc-dirty-rate", {}, {"x": 1}, *({"calc-time": v} for v in WRONG),
           {"calc-time": 61}, {"calc-time": 2**63}, {"calc-time": -(2**63)},
           *({"calc-time": 49, "calc-time-unit": v} for v in WRONG),
           {"calc-time": 49, "calc-time-unit": "millisecond"},
           {"calc-time": 60001, "calc-time-unit": "millisecond"},
           *({"calc-time": 0, "sample-pages": v} for v in WRONG),
           {"calc-time": 1, "sample-pages": 127},
           {"calc-time": 1, "sample-pages": 16385},
           *({"calc-time": 0, "mode": v} for v in WRONG),
           {"calc-time": 1, "mode": "dirty-ring"},
           {"calc-time": 1, "mode": "dirty-bitmap", "sample-pages": 512}),
    *calls("human-monitor-command", {}, {"x": 1},
           *({"command-line": v} for v in WRONG if v != "x"),
           *({"command-line": "", "cpu-index": v} for v in WRONG if v != 0),
           {"command-line": "", "x": 1}),
    *calls("getfd", {}, {"fdname": 1}, {"fdname": "x"}, {"fdname": "1"},
           {"fdname": "x", "x": 1}),
    *calls("closefd", {}, {"fdname": None}, {"fdname": "nope"}),
]  # fmt: skip

EXCHANGES = [*MIGRATE, *MIGRATE_INCOMING, *OTHERS]
