"""Argument errors have QEMU's words, and introspection is complete."""

from __future__ import annotations

import pytest

from common.qmp import schema
from common.qmp.session import CommandError

SCHEMA = schema.load()


def failure(command: str, arguments) -> str | None:
    try:
        SCHEMA.commands[command].check(arguments)
    except CommandError as error:
        return error.desc
    return None


def channel(**addr):
    return {"channels": [{"channel-type": "main", "addr": addr}]}


def wrong(path: str, expected: str) -> str:
    return f"Invalid parameter type for '{path}', expected: {expected}"


def expects(path: str, width: str) -> str:
    return f"Parameter '{path}' expects {width}"


def missing(path: str) -> str:
    return f"Parameter '{path}' is missing"


def unexpected(path: str) -> str:
    return f"Parameter '{path}' is unexpected"


INET = {"transport": "socket", "type": "inet", "host": "", "port": "1"}

CASES = [
    # nothing wrong
    ("query-migrate", {}, None),
    ("migrate", {}, None),
    ("migrate", {"uri": "tcp:a:1", "detach": True, "resume": False}, None),
    ("migrate", channel(**INET, to=65535, ipv4=True), None),
    ("migrate", channel(transport="socket", type="unix", path="/p"), None),
    ("migrate", channel(transport="exec", args=["a", "b"]), None),
    ("migrate", channel(transport="rdma", host="h", port="1"), None),
    ("migrate", channel(transport="file", filename="f", offset=0), None),
    ("migrate-set-capabilities", {"capabilities": []}, None),
    ("migrate-set-parameters", {"tls-creds": None, "tls-authz": "x"}, None),
    ("migrate-set-parameters", {"max-bandwidth": 2**64 - 1}, None),
    ("pmemsave", {"val": 0, "size": 4096, "filename": "/tmp/x"}, None),
    ("qmp_capabilities", {"enable": ["oob", "oob"]}, None),
    ("migrate_set_parameter", {"parameter": "mode", "value": None}, None),
    ("migrate_set_parameter", {"max-bandwidth": 1}, None),
    # members
    ("query-migrate", {"x": 1}, unexpected("x")),
    ("migrate", {"blk": True}, unexpected("blk")),
    ("migrate", {"blk": 1, "uri": 1}, wrong("uri", "string")),
    ("migrate-recover", {}, missing("uri")),
    ("migrate-recover", {"x": 1}, missing("uri")),
    ("migrate-set-capabilities", {}, missing("capabilities")),
    ("migrate-set-parameters", {"max_bandwidth": 1}, unexpected("max_bandwidth")),
    ("migrate-set-parameters", {"compress-level": 1}, unexpected("compress-level")),
    ("migrate_set_parameter", {}, missing("parameter")),
    ("migrate_set_parameter", {"parameter": "mode"}, missing("value")),
    ("migrate_set_parameter", {"nope": 1}, unexpected("nope")),
    (
        "migrate_set_parameter",
        {"parameter": "nope", "value": 1},
        "Parameter 'parameter' does not accept value 'nope'",
    ),
    # types
    ("migrate", {"uri": None}, wrong("uri", "string")),
    ("migrate", {"detach": None}, wrong("detach", "boolean")),
    ("migrate", {"detach": 1}, wrong("detach", "boolean")),
    ("migrate", {"detach": "true"}, wrong("detach", "boolean")),
    ("migrate", {"channels": {}}, wrong("channels", "array")),
    ("migrate", {"channels": [1]}, wrong("channels[0]", "object")),
    ("pmemsave", {"val": 1.0}, wrong("val", "integer")),
    ("pmemsave", {"val": True}, wrong("val", "integer")),
    ("pmemsave", {"val": 2**63}, wrong("val", "integer")),
    ("pmemsave", {"val": -(2**63), "size": "1"}, wrong("size", "integer")),
    ("migrate-continue", {"state": 1}, wrong("state", "string")),
    ("migrate-set-parameters", {"tls-creds": 1}, wrong("tls-creds", "StrOrNull")),
    # enums name the last member only
    (
        "migrate-continue",
        {"state": "bogus"},
        "Parameter 'state' does not accept value 'bogus'",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "compress", "state": True}]},
        "Parameter 'capability' does not accept value 'compress'",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": 1}]},
        wrong("capabilities[0].state", "boolean"),
    ),
    (
        "qmp_capabilities",
        {"enable": ["x"]},
        "Parameter 'null' does not accept value 'x'",
    ),
    ("qmp_capabilities", {"enable": [1]}, wrong("enable[0]", "string")),
    # channels
    ("migrate", channel(), missing("channels[0].addr.transport")),
    (
        "migrate",
        channel(transport="bogus"),
        "Parameter 'transport' does not accept value 'bogus'",
    ),
    ("migrate", channel(transport="socket"), missing("channels[0].addr.type")),
    (
        "migrate",
        channel(**{**INET, "port": 1}),
        wrong("channels[0].addr.port", "string"),
    ),
    ("migrate", channel(**INET, path="x"), unexpected("channels[0].addr.path")),
    ("migrate", channel(**INET, to=65536), expects("to", "uint16_t")),
    (
        "migrate",
        channel(transport="file", filename="f"),
        missing("channels[0].addr.offset"),
    ),
    # unsigned integers
    *(
        (
            "migrate-set-parameters",
            {"max-bandwidth": bad},
            expects("max-bandwidth", "uint64"),
        )
        for bad in (1.5, 1.0, "1M", None, True, -1, 1.8446744073709552e19)
    ),
    (
        "migrate-set-parameters",
        {"multifd-channels": 256},
        expects("multifd-channels", "uint8_t"),
    ),
    (
        "migrate-set-parameters",
        {"multifd-channels": "2"},
        expects("multifd-channels", "uint64"),
    ),
    (
        "migrate-set-parameters",
        {"x-checkpoint-delay": 2**32},
        expects("x-checkpoint-delay", "uint32_t"),
    ),
]


@pytest.mark.parametrize(("command", "arguments", "desc"), CASES)
def test_argument_checking(command, arguments, desc):
    assert failure(command, arguments) == desc


INTEGER = "expects an integer in the range of "
VALUE = "expects a value between "

# Parameter, the least and greatest accepted value, and the end of the range text.
RANGES = [
    ("downtime-limit", 0, 2000000, INTEGER + "0 to (2000 * 1000) ms"),
    ("announce-initial", 0, 100000, VALUE + "0 and 100000"),
    ("announce-max", 0, 100000, VALUE + "0 and 100000"),
    ("announce-rounds", 0, 1000, VALUE + "0 and 1000"),
    ("announce-step", 1, 10000, VALUE + "0 and 10000"),
    ("throttle-trigger-threshold", 1, 100, INTEGER + "1 to 100"),
    ("cpu-throttle-initial", 1, 99, INTEGER + "1 to 99"),
    ("cpu-throttle-increment", 1, 99, INTEGER + "1 to 99"),
    ("max-cpu-throttle", 20, 99, INTEGER + "cpu_throttle_initial to 99"),
    ("multifd-channels", 1, 255, VALUE + "1 and 255"),
    ("multifd-zlib-level", 0, 9, VALUE + "0 and 9"),
    ("multifd-zstd-level", 0, 20, VALUE + "0 and 20"),
    ("multifd-qatzip-level", 1, 9, VALUE + "1 and 9"),
    (
        "xbzrle-cache-size",
        4096,
        2**63,
        "expects a power of two no less than the target page size",
    ),
    ("x-vcpu-dirty-limit-period", 1, 1000, VALUE + "1 and 1000"),
    ("vcpu-dirty-limit", 1, 2**64 - 1, "must be greater than 1 MB/s"),
]


def check_range(name: str, value: int) -> None:
    values = SCHEMA.defaults("MigrationParameters")
    if name == "cpu-throttle-initial":
        values["max-cpu-throttle"] = 99
    SCHEMA.check_ranges("MigrationParameters", {**values, name: value})


@pytest.mark.parametrize(("name", "low", "high", "text"), RANGES)
def test_ranges(name, low, high, text):
    shown = name if name.startswith("x-") else name.replace("-", "_")
    check_range(name, low)
    check_range(name, high)
    for outside in (low - 1, high + 1):
        with pytest.raises(CommandError) as caught:
            check_range(name, outside)
        assert caught.value.desc == f"Parameter '{shown}' {text}"


def test_cache_size_is_a_power_of_two():
    with pytest.raises(CommandError, match="power of two"):
        check_range("xbzrle-cache-size", 4096 + 8192)


def test_a_bound_that_is_another_parameter():
    with pytest.raises(CommandError, match="max_cpu_throttle"):
        SCHEMA.check_ranges(
            "MigrationParameters", {"cpu-throttle-initial": 50, "max-cpu-throttle": 40}
        )


def test_every_parameter_but_one_has_a_default():
    names = set(SCHEMA.enum("MigrationParameter"))
    assert len([name for name in names if not name.startswith("x-postcopyd-")]) == 29
    without = names - set(SCHEMA.defaults("MigrationParameters"))
    assert without == {"block-bitmap-mapping"}


def test_capabilities_are_all_there_in_order():
    assert " ".join(SCHEMA.enum("MigrationCapability")) == (
        "xbzrle rdma-pin-all auto-converge zero-blocks events postcopy-ram x-colo "
        "release-ram return-path pause-before-switchover multifd dirty-bitmaps "
        "postcopy-blocktime late-block-activate x-ignore-shared validate-uuid "
        "background-snapshot zero-copy-send postcopy-preempt switchover-ack "
        "dirty-limit mapped-ram"
    )


# --- introspection ---

ENTITIES = SCHEMA.introspect(SCHEMA.commands.values())
BY_NAME = {entity["name"]: entity for entity in ENTITIES}

REQUIRED = {
    "command": {"arg-type", "ret-type"},
    "event": {"arg-type"},
    "object": {"members"},
    "array": {"element-type"},
    "enum": {"members", "values"},
    "alternate": {"members"},
    "builtin": {"json-type"},
}
OPTIONAL = {"command": {"allow-oob"}, "object": {"tag", "variants"}}


def references(value):
    """Every type name that an entity mentions."""
    if isinstance(value, list):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("type", "arg-type", "ret-type", "element-type"):
                yield item
            elif key in ("members", "variants"):
                yield from references(item)


def test_names_are_unique_and_every_reference_is_defined():
    assert len(BY_NAME) == len(ENTITIES)
    referred = {name for entity in ENTITIES for name in references(entity)}
    assert referred <= set(BY_NAME)
    types = {e["name"] for e in ENTITIES if e["meta-type"] not in ("command", "event")}
    assert types - {"0"} <= referred


@pytest.mark.parametrize("entity", ENTITIES, ids=lambda entity: entity["name"])
def test_entities_have_the_members_of_their_kind(entity):
    kind = entity["meta-type"]
    members = set(entity) - {"name", "meta-type", "features"}
    assert REQUIRED[kind] <= members <= REQUIRED[kind] | OPTIONAL.get(kind, set())


def test_each_entity_is_what_the_schema_says_of_schemas():
    returns = SCHEMA.commands["query-qmp-schema"].returns
    returns.check(ENTITIES, "return")


def test_a_command_without_arguments():
    assert BY_NAME["migrate-pause"] == {
        "name": "migrate-pause",
        "meta-type": "command",
        "arg-type": "0",
        "ret-type": "0",
        "allow-oob": True,
    }
    assert BY_NAME["0"] == {"name": "0", "meta-type": "object", "members": []}
    assert "allow-oob" not in BY_NAME["migrate"]


def test_walk_from_a_command_to_an_enum():
    arguments = BY_NAME[BY_NAME["migrate-set-capabilities"]["arg-type"]]
    array = BY_NAME[arguments["members"][0]["type"]]
    status = BY_NAME[array["element-type"]]
    capability = BY_NAME[status["members"][0]["type"]]
    assert array["name"] == f"[{status['name']}]"
    assert "postcopy-preempt" in capability["values"]
    assert {"name": "x-colo", "features": ["unstable"]} in capability["members"]


def test_a_tagged_object_lists_every_case():
    arguments = BY_NAME[BY_NAME["migrate"]["arg-type"]]
    assert [m["name"] for m in arguments["members"]] == [
        "uri", "channels", "detach", "resume",
    ]  # fmt: skip
    assert all(m["default"] is None for m in arguments["members"])
    channels = BY_NAME[BY_NAME[arguments["members"][1]["type"]]["element-type"]]
    address = BY_NAME[channels["members"][1]["type"]]
    assert address["tag"] == "transport"
    cases = [variant["case"] for variant in address["variants"]]
    assert cases == ["socket", "exec", "rdma", "file"]


def test_only_served_commands_are_listed():
    served = SCHEMA.served_by(["migrate_cancel", "qmp_capabilities"])
    assert set(served) == {"migrate_cancel", "migrate-cancel", "qmp_capabilities"}
    listed = {
        entity["name"]
        for entity in SCHEMA.introspect(served.values())
        if entity["meta-type"] == "command"
    }
    assert listed == set(served)


def test_a_handler_that_the_schema_does_not_know():
    with pytest.raises(ValueError, match="nonsense"):
        SCHEMA.served_by(["nonsense"])


def test_everything_is_documented():
    for entry in [*SCHEMA.commands.values(), *SCHEMA.events.values()]:
        assert entry.doc, entry.name
