"""Requests, negotiation, the order of checks, and out-of-band execution."""

from __future__ import annotations

from support.exchanges import NEGOTIATE, NEGOTIATE_OOB, exchange, oob, request

NAME = request("query-name", id="name")
STATUS = request("query-status", id="status")


def before(name: str, *writes: bytes):
    """An exchange in which negotiation has not taken place."""
    return exchange(f"not negotiated: {name}", *writes, negotiate=b"")


# Each is followed by a good request.
MEMBERS = [
    exchange(f"members {text}", text.encode() + NAME)
    for text in (
        "{}",
        '{"id": 1}',
        '{"arguments": {}}',
        '{"execute": null}',
        '{"execute": 1, "id": 1}',
        '{"execute": true}',
        '{"execute": ["query-name"]}',
        '{"execute": {"name": "query-name"}}',
        '{"execute": ""}',
        '{"execute": "query-name", "arguments": null, "id": 2}',
        '{"execute": "query-name", "arguments": []}',
        '{"execute": "query-name", "arguments": "x"}',
        '{"execute": "query-name", "arguments": 1}',
        '{"execute": "query-name", "arguments": false}',
        '{"execute": "query-name", "arguments": {}}',
        '{"execute": "query-name", "arguments": {"x": 1}}',
        '{"execute": "query-name", "arguments": {"": 1}}',
        '{"execute": "query-name", "extra": 1, "id": 3}',
        '{"execute": "query-name", "": 1}',
        '{"execute": "query-name", "Id": 1}',
        '{"execute": "query-name", "exec-oob": "query-name"}',
        '{"exec-oob": "query-name", "execute": "query-name"}',
        '{"exec-oob": "query-name", "id": 4}',
        '{"exec-oob": 1}',
        '{"Execute": "query-name"}',
        '{"return": {}}',
        '{"event": "STOP", "id": 5}',
        '{"execute": "nope", "arguments": 1}',
        '{"execute": "nope", "extra": 1}',
        '{"execute": "nope", "arguments": {"x": 1}}',
        '{"arguments": 1}',
        '{"id": {"a": [1]}, "execute": "nope"}',
    )
]

NAMES = [
    exchange(f"command {name!r}", request(name, id=1))
    for name in (
        "nope", "Query-Name", "query_name", " query-name", "query-name ", "query",
        "query-events", "migrate_set_speed", "migrate_set_downtime",
        "migrate-set-cache-size", "query-migrate-cache-size", "cont\n", "\u00e4",
        "\u20ac\U0001f600", "'", '"', "{", "%s%n",
    )
]  # fmt: skip

NEGOTIATION = [
    before("nothing sent"),
    before("a command", NAME),
    before("quit", request("quit", id=1)),
    before("an unknown command", request("nope")),
    before("a command with wrong arguments", request("migrate", {"x": 1})),
    before("no command", b'{"id": 7}'),
    before("an unexpected member", b'{"execute": "query-name", "x": 1}'),
    before("broken JSON", b'{"execute"}' + b"}" + NEGOTIATE + NAME),
    before("a stray byte", b"%\n" + NEGOTIATE + NAME),
    before("no object", b"[]" + NEGOTIATE + NAME),
    before("out of band", oob("migrate-pause", id=1) + NEGOTIATE),
    before("an event of ours", b'{"event": "STOP"}' + NEGOTIATE),
    before("enable nothing", request("qmp_capabilities", {"enable": []}) + NAME),
    before("enable oob", request("qmp_capabilities", {"enable": ["oob"]})),
    before("enable oob twice", request("qmp_capabilities", {"enable": ["oob", "oob"]})),
    before("enable null", request("qmp_capabilities", {"enable": None}) + NAME),
    before("enable a string", request("qmp_capabilities", {"enable": "oob"}) + NAME),
    before("enable a number", request("qmp_capabilities", {"enable": [1]}) + NAME),
    before("enable an unknown", request("qmp_capabilities", {"enable": ["x"]}) + NAME),
    before("enable OOB", request("qmp_capabilities", {"enable": ["OOB"]}) + NAME),
    before("unexpected argument", request("qmp_capabilities", {"x": 1}) + NAME),
    before("second attempt", request("qmp_capabilities", {"x": 1}), NEGOTIATE, NAME),
    exchange("negotiate again", NEGOTIATE + NAME),
    exchange("negotiate again, wrongly", request("qmp_capabilities", {"x": 1}) + NAME),
    exchange("negotiate again, out of band", oob("qmp_capabilities") + NAME),
]

# A reply that goes by no id is a reply in its turn.
ORDER = [
    exchange("in order", b"".join(request("query-name", id=i) for i in range(20))),
    exchange("errors in order", NAME + b'{"id": 1}' + STATUS + b"}" + NAME),
    exchange("same id again and again", NAME * 5),
    exchange("event in front of its reply", request("stop", id=1),
             request("cont", id=2), ends=("source",)),
    exchange("stop twice", request("stop"), request("stop"), STATUS, ends=("source",)),
    exchange("cont when it runs", request("cont"), STATUS, ends=("source",)),
    exchange("stop, look, cont, look", request("stop"), STATUS, request("cont"), STATUS,
             ends=("source",)),
    exchange("stop before the guest is here", request("stop"), STATUS,
             ends=("destination",)),
    exchange("cont before the guest is here", request("cont"), STATUS,
             ends=("destination",)),
]  # fmt: skip


def ahead(name: str, *writes: bytes, **options):
    options |= {"negotiate": NEGOTIATE_OOB, "asks_last": True}
    return exchange(f"with oob: {name}", *writes, **options)


OUT_OF_BAND = [
    ahead(text, text.encode())
    for text in (
        '{"exec-oob": "migrate-pause", "id": 1}',
        '{"exec-oob": "migrate-pause", "arguments": {}, "id": 1}',
        '{"exec-oob": "migrate-pause", "arguments": {"x": 1}, "id": 1}',
        '{"exec-oob": "migrate-pause", "arguments": [], "id": 1}',
        '{"exec-oob": "migrate-pause", "x": 1, "id": 1}',
        '{"exec-oob": "migrate-recover", "arguments": {"uri": "tcp:x"}, "id": 1}',
        '{"exec-oob": "migrate-recover", "arguments": {"uri": 1}, "id": 1}',
        '{"exec-oob": "migrate-recover", "id": 1}',
        '{"exec-oob": "query-name", "id": 1}',
        '{"exec-oob": "quit", "id": 1}',
        '{"exec-oob": "nope", "id": 1}',
        '{"exec-oob": 1, "id": 1}',
        '{"exec-oob": null}',
        '{"exec-oob": "qmp_capabilities", "id": 1}',
        '{"exec-oob": "query-name", "execute": "query-name", "id": 1}',
        '{"execute": "migrate-pause", "id": 1}',
        '{"execute": "migrate-recover", "arguments": {"uri": "unix:/x"}, "id": 1}',
        '{"execute": "query-name", "exec-oop": 1}',
        '{"id": 1}',
        "[]",
        "}",
    )
]

QUEUE = [
    ahead("in order", b"".join(request("query-name", id=i) for i in range(8))),
    ahead("more than the queue holds",
          b"".join(request("query-name", id=i) for i in range(50))),
    ahead("one behind the other", oob("migrate-pause", id=1) + oob("nope", id=2)),
    ahead("negotiate again", NEGOTIATE),
]  # fmt: skip

EXCHANGES = [*MEMBERS, *NAMES, *NEGOTIATION, *ORDER, *OUT_OF_BAND, *QUEUE]
