"""Capabilities and parameters: types, ranges, dependencies, all or nothing."""

from __future__ import annotations

from itertools import chain, permutations

from support.exchanges import calls, exchange, request

CAPABILITIES = (
    "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "events", "postcopy-ram",
    "x-colo", "release-ram", "return-path", "pause-before-switchover", "multifd",
    "dirty-bitmaps", "postcopy-blocktime", "late-block-activate", "x-ignore-shared",
    "validate-uuid", "background-snapshot", "zero-copy-send", "postcopy-preempt",
    "switchover-ack", "dirty-limit", "mapped-ram",
)  # fmt: skip

WRONG = (None, True, 0, -1, 1.5, "x", [], {})
QUERY_CAPABILITIES = request("query-migrate-capabilities")
QUERY_PARAMETERS = request("query-migrate-parameters")


def turned(*on: str, off: tuple[str, ...] = ()) -> dict:
    """Arguments that turn some on and then some off."""
    states = [(name, True) for name in on] + [(name, False) for name in off]
    return {"capabilities": [{"capability": n, "state": s} for n, s in states]}


def caps(name: str, *steps: dict):
    """Set them one after the other, and look at the result."""
    asked = [request("migrate-set-capabilities", step) for step in steps]
    return exchange(f"capabilities: {name}", *asked, QUERY_CAPABILITIES)


def parameters(name: str, *steps: dict):
    asked = [request("migrate-set-parameters", step) for step in steps]
    return exchange(f"parameters: {name}", *asked, QUERY_PARAMETERS)


# Two that exclude each other, or one that needs another.
CONFLICTS = (
    ("postcopy-ram", "x-ignore-shared"), ("postcopy-ram", "multifd"),
    ("auto-converge", "dirty-limit"), ("multifd", "xbzrle"), ("mapped-ram", "xbzrle"),
    ("mapped-ram", "postcopy-ram"), ("zero-copy-send", "xbzrle"),
    ("zero-copy-send", "postcopy-ram"),
    ("background-snapshot", "postcopy-ram"), ("background-snapshot", "dirty-bitmaps"),
    ("background-snapshot", "postcopy-blocktime"),
    ("background-snapshot", "late-block-activate"),
    ("background-snapshot", "return-path"), ("background-snapshot", "multifd"),
    ("background-snapshot", "pause-before-switchover"),
    ("background-snapshot", "auto-converge"), ("background-snapshot", "release-ram"),
    ("background-snapshot", "rdma-pin-all"), ("background-snapshot", "xbzrle"),
    ("background-snapshot", "x-colo"), ("background-snapshot", "validate-uuid"),
    ("background-snapshot", "zero-copy-send"),
)  # fmt: skip

WRONG_CAPABILITIES = [
    *calls(
        "migrate-set-capabilities",
        {},
        {"x": 1},
        {"capabilities": [], "x": 1},
        *({"capabilities": value} for value in WRONG),
        *({"capabilities": [value]} for value in WRONG),
        *({"capabilities": [{"capability": v, "state": True}]} for v in WRONG),
        *({"capabilities": [{"capability": "events", "state": v}]} for v in WRONG),
        {"capabilities": [{"state": True}]},
        {"capabilities": [{"capability": "events"}]},
        {"capabilities": [{"capability": "events", "state": True, "x": 1}]},
        turned("Events"),
        turned("postcopy_ram"),
        turned("compress"),
        turned("block"),
        turned("events", "nope"),
    )
]

DEPENDENCIES = [
    *(caps(f"{name} on", turned(name)) for name in CAPABILITIES),
    *(caps(f"{name} off", turned(off=(name,))) for name in CAPABILITIES),
    *chain.from_iterable(
        [caps(f"{a} and {b}", turned(a, b)), caps(f"{a} behind {b}", turned(b, a))]
        for a, b in CONFLICTS
    ),
    caps("none", {"capabilities": []}),
    caps("all off", turned(off=CAPABILITIES)),
    caps("on and off again in one list", turned("events", off=("events",))),
    caps("one good and one wrong", turned("events", "nope")),
    caps("preempt and postcopy", turned("postcopy-preempt", "postcopy-ram")),
    caps("postcopy and preempt", turned("postcopy-ram", "postcopy-preempt")),
    caps("preempt behind postcopy", turned("postcopy-ram"), turned("postcopy-preempt")),
    caps("postcopy off under preempt", turned("postcopy-ram", "postcopy-preempt"),
         turned(off=("postcopy-ram",))),
    caps("both off", turned("postcopy-ram", "postcopy-preempt"),
         turned(off=("postcopy-ram", "postcopy-preempt"))),
    caps("ours, all at once", turned("events", "postcopy-ram", "postcopy-preempt",
                                     "postcopy-blocktime", "return-path",
                                     "late-block-activate")),
    caps("events twice", turned("events"), turned("events")),
    caps("all or nothing", turned("events", "postcopy-preempt")),
    caps("switchover-ack and return-path", turned("switchover-ack", "return-path")),
]  # fmt: skip

UNSIGNED = (
    "max-bandwidth", "max-postcopy-bandwidth", "avail-switchover-bandwidth",
    "downtime-limit", "announce-initial", "announce-max", "announce-rounds",
    "announce-step", "throttle-trigger-threshold", "cpu-throttle-initial",
    "cpu-throttle-increment", "max-cpu-throttle", "multifd-channels",
    "multifd-zlib-level", "multifd-zstd-level", "multifd-qatzip-level",
    "xbzrle-cache-size", "x-checkpoint-delay", "x-vcpu-dirty-limit-period",
    "vcpu-dirty-limit",
)  # fmt: skip
OF_OTHER_TYPES = (
    "cpu-throttle-tailslow", "direct-io", "tls-creds", "tls-hostname", "tls-authz",
    "mode", "zero-page-detection", "multifd-compression", "block-bitmap-mapping",
)  # fmt: skip
TEXTS = ("tls-creds", "tls-hostname", "tls-authz")

# On both sides of every bound.
BOUNDS = {
    "max-bandwidth": (0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    "max-postcopy-bandwidth": (0, 2**64 - 1, 2**64),
    "avail-switchover-bandwidth": (0, 2**64 - 1),
    "downtime-limit": (0, 2_000_000, 2_000_001, 2**64 - 1),
    "announce-initial": (0, 100_000, 100_001),
    "announce-max": (0, 100_000, 100_001),
    "announce-rounds": (0, 1000, 1001),
    "announce-step": (0, 1, 10_000, 10_001),
    "throttle-trigger-threshold": (0, 1, 100, 101, 255, 256),
    "cpu-throttle-initial": (0, 1, 99, 100, 256),
    "cpu-throttle-increment": (0, 1, 99, 100, 256),
    "max-cpu-throttle": (19, 20, 99, 100, 256),
    "multifd-channels": (0, 1, 255, 256),
    "multifd-zlib-level": (0, 9, 10, 256),
    "multifd-zstd-level": (0, 20, 21, 256),
    "multifd-qatzip-level": (0, 1, 9, 10, 256),
    "xbzrle-cache-size": (0, 1, 2048, 4096, 4097, 65536, 2**63, 2**64 - 1),
    "x-checkpoint-delay": (0, 2**32 - 1, 2**32),
    "x-vcpu-dirty-limit-period": (0, 1, 1000, 1001),
    "vcpu-dirty-limit": (0, 1, 2),
}

WRONG_PARAMETERS = [
    *chain.from_iterable(
        calls("migrate-set-parameters",
              *({name: v} for v in (None, True, 1.5, 1.0, "1", "1M", [], {})))
        for name in UNSIGNED
    ),
    *chain.from_iterable(
        # An array is right for one of them, and could not be taken back.
        calls("migrate-set-parameters",
              *({name: v} for v in WRONG if v is not None and v != []))
        for name in OF_OTHER_TYPES if name not in TEXTS
    ),
    *chain.from_iterable(
        calls("migrate-set-parameters",
              *({name: v} for v in WRONG if v is not None and not isinstance(v, str)))
        for name in TEXTS
    ),
    *calls("migrate-set-parameters", {"x": 1}, {"max_bandwidth": 1}, {"Mode": "normal"},
           {"compress-level": 1}, {"compress-threads": 1}, {"decompress-threads": 1},
           {"compress-wait-thread": True}, {"block-incremental": False},
           {"max-bandwidth": 1, "x": 1}, {"x": 1, "max-bandwidth": "1"},
           {"downtime-limit": 2_000_001, "max-bandwidth": "1"},
           {"mode": None}, {"direct-io": None}, {"zero-page-detection": None}),
]  # fmt: skip

RANGES = [
    *chain.from_iterable(
        [parameters(f"{name} {value}", {name: value}) for value in values]
        for name, values in BOUNDS.items()
    ),
    parameters("nothing", {}),
    parameters("as they are by default", {"max-bandwidth": 134217728}),
    parameters("all or nothing", {"max-bandwidth": 5, "downtime-limit": 2_000_001}),
    parameters("one after the other", {"max-bandwidth": 5}, {"downtime-limit": 6}),
    parameters("initial above max", {"cpu-throttle-initial": 50,
                                     "max-cpu-throttle": 40}),
    parameters("max below initial, later", {"cpu-throttle-initial": 50},
               {"max-cpu-throttle": 40}),
    parameters("initial above max, later", {"max-cpu-throttle": 40},
               {"cpu-throttle-initial": 50}),
    parameters("TLS names", {"tls-creds": "a", "tls-hostname": "b", "tls-authz": "c"}),
    parameters("TLS names taken back", {"tls-hostname": "b"}, {"tls-hostname": None}),
    parameters("a TLS name is empty", {"tls-hostname": "b"}, {"tls-hostname": ""}),
    *(parameters(f"multifd-compression {v}", {"multifd-compression": v})
      for v in ("none", "zlib", "zstd", "nope")),
    *(parameters(f"mode {v}", {"mode": v})
      for v in ("normal", "cpr-reboot", "cpr-transfer", "nope")),
    *(parameters(f"zero-page-detection {v}", {"zero-page-detection": v})
      for v in ("none", "legacy", "multifd", "nope")),
    *(parameters(f"{name} {v}", {name: v}) for v in (True, False)
      for name in ("direct-io", "cpu-throttle-tailslow")),
    *(parameters(f"block-bitmap-mapping {v}", {"block-bitmap-mapping": v})
      for v in ([{}], [{"node-name": "a"}], [{"node-name": "a", "alias": "b"}],
                [{"node-name": "a", "alias": "b", "bitmaps": [{}]}],
                [{"node-name": 1, "alias": "b", "bitmaps": []}])),
]  # fmt: skip

PAIRS = [
    parameters(f"{a} and {b} wrong", {a: "x", b: "x"})
    for a, b in permutations(("max-bandwidth", "downtime-limit", "multifd-channels"), 2)
]

EXCHANGES = [*WRONG_CAPABILITIES, *DEPENDENCIES, *WRONG_PARAMETERS, *RANGES, *PAIRS]
