"""Lines of the human monitor, by `human-monitor-command`."""

from __future__ import annotations

from support.exchanges import exchange, request

SOURCE = ("source",)
DESTINATION = ("destination",)


def line(text: str, **options):
    """One line; what it prints is the reply."""
    asked = request("human-monitor-command", {"command-line": text})
    return exchange(f"line {text!r}", asked, **options)


def lines(name: str, *texts: str, **options):
    """Several, and the settings that come of them."""
    asked = [request("human-monitor-command", {"command-line": t}) for t in texts]
    query = request("query-migrate-parameters")
    return exchange(f"lines: {name}", *asked, query, **options)


def parameter(name: str, *values: str):
    """Give a parameter one value after the other, looking at each."""
    return [
        exchange(f"line migrate_set_parameter {name} {value}",
                 request("human-monitor-command",
                         {"command-line": f"migrate_set_parameter {name} {value}"}),
                 request("query-migrate-parameters"))
        for value in values
    ]  # fmt: skip


GRAMMAR = [
    line(text)
    for text in (
        "", " ", "\t", "nope", "nope x", " nope ", "info nope", "info nope x",
        "info status", " info  status ", "info status x", "info name", "info uuid",
        "help nope", "help help x y", "migrate_cancel x", "migrate_pause x",
        "migrate_start_postcopy x", "info migrate_capabilities x",
        "info migrate_parameters x", "info uuid x", "info name x",
        "migrate_set_capability", "migrate_set_capability events",
        "migrate_set_capability events true", "migrate_set_capability events maybe",
        "migrate_set_capability events on x", "migrate_set_capability nope on",
        "migrate_set_capability Events on", 'migrate_set_capability "events" on',
        'migrate_set_capability "" on', "migrate_set_parameter",
        "migrate_set_parameter max-bandwidth", "migrate_set_parameter nope 1",
        "migrate_set_parameter max-bandwidth 1 2", "migrate_recover",
        "migrate_recover x y", "migrate_continue", "migrate_continue nope",
        "migrate_continue active", "migrate_continue active x", "stop x", "cont x",
        "s x", "c x",
    )
]  # fmt: skip

WRONG_STATE = [
    line(text, ends=ends)
    for text, ends in (
        ("migrate_start_postcopy", ("source", "destination")),
        ("migrate_pause", ("source", "destination")),
        ("migrate_cancel", ("source", "destination")),
        ("migrate_recover unix:/nowhere", ("source", "destination")),
        ("migrate_recover nope", ("source", "destination")),
        ("migrate_incoming nope:", ("source", "destination")),
        ("migrate_incoming unix:", DESTINATION),
        ("migrate_incoming unix:/nowhere/x", SOURCE),
        ("migrate_incoming", ("source", "destination")),
        ("migrate_incoming x y", ("source", "destination")),
        ("migrate", ("source", "destination")),
        ("migrate x y", ("source", "destination")),
        ("migrate -d", ("source", "destination")),
        ("migrate -z x", ("source", "destination")),
        ("migrate -r nope:", ("source", "destination")),
        ("migrate -d nope:", ("source", "destination")),
        ("migrate -d tcp:x", ("source", "destination")),
        ("migrate -d -r unix:/nowhere", SOURCE),
        ("migrate -d unix:/nowhere", DESTINATION),
        ("migrate -d unix:", ("source", "destination")),
    )
]

SETTINGS = [
    line("info migrate_capabilities"),
    line("info migrate_parameters"),
    lines("a capability", "migrate_set_capability events on",
          "info migrate_capabilities", "migrate_set_capability events off"),
    lines("preempt without postcopy", "migrate_set_capability postcopy-preempt on"),
    lines("postcopy, then preempt", "migrate_set_capability postcopy-ram on",
          "migrate_set_capability postcopy-preempt on", "info migrate_capabilities"),
    lines("a parameter", "migrate_set_parameter downtime-limit 7",
          "info migrate_parameters"),
    *parameter("max-bandwidth", "0", "1", "10M", "1G", "1k", "1.5", "1.5k", "1x", "-1",
               "16E", "17E", "x", '""', "0x10", "1 ", "1T", "10b", "1e3"),
    *parameter("max-postcopy-bandwidth", "0", "100M", "x"),
    *parameter("avail-switchover-bandwidth", "1", "x"),
    *parameter("downtime-limit", "0", "2000000", "2000001", "-1", "1.5", "x", "1k"),
    *parameter("xbzrle-cache-size", "64M", "65536", "4097", "0", "x"),
    *parameter("announce-step", "10", "0", "x"),
    *parameter("multifd-channels", "4", "0", "256", "x"),
    *parameter("cpu-throttle-initial", "50", "0", "100", "x"),
    *parameter("cpu-throttle-tailslow", "on", "off", "true", "x"),
    *parameter("direct-io", "on", "maybe"),
    *parameter("tls-hostname", "name", '""', '"a b"', "1"),
    *parameter("multifd-compression", "zlib", "none", "nope"),
    *parameter("zero-page-detection", "legacy", "nope"),
    *parameter("mode", "normal", "nope"),
    *parameter("block-bitmap-mapping", "x"),
    *parameter("vcpu-dirty-limit", "0", "2"),
    *parameter("x-vcpu-dirty-limit-period", "1", "1001"),
    *parameter("max_bandwidth", "1"),
]  # fmt: skip

RUN_STATE = [
    exchange("lines: stop and cont",
             *(request("human-monitor-command", {"command-line": text})
               for text in ("stop", "info status", "cont", "info status", "s", "c")),
             ends=SOURCE),
    exchange("lines: stop before the guest is here",
             *(request("human-monitor-command", {"command-line": text})
               for text in ("stop", "info status", "cont", "info status")),
             ends=DESTINATION),
    exchange("cpu-index 0", request("human-monitor-command",
                                    {"command-line": "info status", "cpu-index": 0})),
]  # fmt: skip

EXCHANGES = [*GRAMMAR, *WRONG_STATE, *SETTINGS, *RUN_STATE]
