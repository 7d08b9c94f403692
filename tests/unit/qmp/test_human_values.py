"""Parameters as people write them; every line was compared with QEMU 10."""

from __future__ import annotations

import pytest

from common.qmp import human_values, schema
from common.qmp.session import CommandError

PARAMETERS = schema.load().object("MigrationParameters")
MIB = 1 << 20
NO_SIZE = "Parameter 'downtime-limit' expects a non-negative number below 2^64"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-bandwidth", "10", 10 * MIB),
        ("max-bandwidth", "10k", 10240),
        ("max-bandwidth", "10B", 10),
        ("max-bandwidth", "0x10", 16 * MIB),
        ("max-bandwidth", "1.5", 3 * MIB // 2),
        ("avail-switchover-bandwidth", "1G", 1 << 30),
        ("max-postcopy-bandwidth", "10", 10),
        ("downtime-limit", "10k", 10240),
        ("downtime-limit", "1.5k", 1536),
        ("x-checkpoint-delay", "5", 5),
        ("multifd-channels", "0x10", 16),
        ("direct-io", "yes", True),
        ("direct-io", "n", False),
        ("mode", "cpr-reboot", "cpr-reboot"),
        ("tls-creds", "", ""),
        ("tls-hostname", "10", "10"),
    ],
)
def test_value(name: str, text: str, value: object) -> None:
    found = human_values.parse(PARAMETERS, name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("max-bandwidth", "10kb", "Invalid size 10kb"),
        ("max-bandwidth", "-1", "Invalid size -1"),
        ("max-bandwidth", "16E", "Invalid size 16E"),
        ("downtime-limit", "1.5", NO_SIZE),
        ("downtime-limit", "x", NO_SIZE),
        ("downtime-limit", "", NO_SIZE),
        (
            "downtime-limit",
            "-1",
            "Value '-1' is out of range for parameter 'downtime-limit'",
        ),
        ("multifd-channels", "256", "Parameter 'multifd-channels' expects uint8_t"),
        ("multifd-channels", "-1", "Parameter 'multifd-channels' expects uint8_t"),
        ("multifd-channels", "1k", "Parameter 'multifd-channels' expects uint64"),
        (
            "x-checkpoint-delay",
            "4294967296",
            "Parameter 'x-checkpoint-delay' expects uint32_t",
        ),
        ("direct-io", "ON", "Parameter 'direct-io' expects 'on' or 'off'"),
        ("direct-io", "1", "Parameter 'direct-io' expects 'on' or 'off'"),
        ("mode", "bogus", "Parameter 'mode' does not accept value 'bogus'"),
        (
            "block-bitmap-mapping",
            "x",
            "The block-bitmap-mapping parameter can only be set through QMP",
        ),
    ],
)
def test_refused(name: str, text: str, error: str) -> None:
    with pytest.raises(CommandError) as refused:
        human_values.parse(PARAMETERS, name, text)
    assert str(refused.value) == error


@pytest.mark.parametrize("name", schema.load().enum("MigrationParameter"))
@pytest.mark.parametrize("text", ["", "0", "-", "\u0661", "1" * 5000, "on", "\0"])
def test_any_text_for_any_parameter(name: str, text: str) -> None:
    try:
        value = human_values.parse(PARAMETERS, name, text)
    except CommandError:
        return
    PARAMETERS.check_arguments({name: value})
