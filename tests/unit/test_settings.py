"""Capabilities and parameters: all or nothing, in QEMU's order and words."""

from __future__ import annotations

import pytest

from common.qmp.session import CommandError
from common.settings import SUPPORTED, Settings


def switch(settings: Settings, *on: str, off: tuple[str, ...] = ()) -> None:
    settings.set_capabilities(
        [
            *({"capability": name, "state": True} for name in on),
            *({"capability": name, "state": False} for name in off),
        ]
    )


def refusal(settings: Settings, *on: str, off: tuple[str, ...] = ()) -> str:
    before = settings.capabilities()
    with pytest.raises(CommandError) as error:
        switch(settings, *on, off=off)
    assert settings.capabilities() == before
    return str(error.value)


def test_all_are_off_at_start_and_can_be_switched_off() -> None:
    settings = Settings()
    names = [str(item["capability"]) for item in settings.capabilities()]
    assert len(names) == 22
    assert not any(settings.on(name) for name in names)
    switch(settings, off=tuple(names))
    assert not any(settings.on(name) for name in names)


@pytest.mark.parametrize("name", sorted(SUPPORTED - {"postcopy-preempt"}))
def test_supported(name: str) -> None:
    settings = Settings()
    switch(settings, name)
    assert settings.on(name)


# QEMU refuses these alone, in words of its own.
NEED_OTHERS = {"switchover-ack", "zero-copy-send", "dirty-limit"}


def test_unsupported() -> None:
    settings = Settings()
    for item in settings.capabilities():
        name = str(item["capability"])
        if name not in {*SUPPORTED, *NEED_OTHERS}:
            assert refusal(settings, name) == f"Capability '{name}' is not supported"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            ("postcopy-ram", "x-ignore-shared"),
            "Postcopy is not compatible with ignore-shared",
        ),
        (
            ("postcopy-ram", "multifd"),
            "Postcopy is not yet compatible with multifd",
        ),
        (
            ("background-snapshot", "xbzrle"),
            "Background-snapshot is not compatible with xbzrle",
        ),
        (
            ("background-snapshot", "zero-copy-send"),
            "Background-snapshot is not compatible with zero-copy-send",
        ),
        (
            ("zero-copy-send",),
            "Zero copy only available for non-compressed non-TLS multifd migration",
        ),
        (
            ("zero-copy-send", "multifd", "xbzrle"),
            "Zero copy only available for non-compressed non-TLS multifd migration",
        ),
        (
            ("dirty-limit",),
            "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set",
        ),
        (("postcopy-preempt",), "Postcopy preempt requires postcopy-ram"),
        (
            ("switchover-ack",),
            "Capability 'switchover-ack' requires capability 'return-path'",
        ),
        (("multifd", "xbzrle"), "Multifd is not compatible with xbzrle"),
        (
            ("mapped-ram", "postcopy-ram"),
            "Mapped-ram migration is incompatible with postcopy",
        ),
        (
            ("dirty-limit", "auto-converge"),
            "dirty-limit conflicts with auto-converge either of then available"
            " currently",
        ),
    ],
)
def test_combinations(names: tuple[str, ...], text: str) -> None:
    assert refusal(Settings(), *names) == text
    assert refusal(Settings(), *reversed(names)) == text


def test_order_in_the_list_does_not_matter() -> None:
    settings = Settings()
    switch(settings, "postcopy-preempt", "postcopy-ram")
    text = "Postcopy preempt requires postcopy-ram"
    assert refusal(settings, off=("postcopy-ram",)) == text
    switch(settings, off=("postcopy-ram", "postcopy-preempt"))
    assert not settings.on("postcopy-ram")


def test_a_name_twice_is_what_it_is_last() -> None:
    settings = Settings()
    switch(settings, "events", off=("events",))
    assert not settings.on("events")


def test_postcopy_that_the_host_cannot_do() -> None:
    """Asked only when it is switched on newly, and before all combinations."""
    settings = Settings()
    asked = []

    def problem() -> str | None:
        asked.append(True)
        return "the moon is full; wait"

    settings.postcopy_problem = problem
    switch(settings, "events", "return-path")
    assert not asked
    text = "Postcopy is not supported: the moon is full; wait"
    assert refusal(settings, "postcopy-ram", "multifd") == text
    settings.postcopy_problem = lambda: None
    switch(settings, "postcopy-ram")
    settings.postcopy_problem = problem
    switch(settings, "postcopy-ram", "postcopy-blocktime")
    assert len(asked) == 1


def test_preempt_after_listening() -> None:
    settings = Settings()
    switch(settings, "postcopy-ram")
    settings.listening = lambda: True
    text = "Postcopy preempt must be set before incoming starts"
    assert refusal(settings, "postcopy-preempt") == text
    settings.listening = lambda: False
    switch(settings, "postcopy-preempt")
    settings.listening = lambda: True
    switch(settings, "postcopy-preempt", "events")


# --- parameters -----------------------------------------------------------------------


def test_defaults() -> None:
    settings = Settings()
    assert settings.number("max-bandwidth") == 128 << 20
    assert settings.number("downtime-limit") == 300
    assert settings.number("max-postcopy-bandwidth") == 0


def test_parameters_are_stored_and_told() -> None:
    settings = Settings()
    told = []
    settings.changed = lambda: told.append(settings.number("max-bandwidth"))
    settings.set_parameters({"max-bandwidth": 0, "tls-creds": None})
    assert told == [0]
    assert settings.parameters()["tls-creds"] == ""
    settings.set_parameters({})
    assert told == [0, 0]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (
            {"downtime-limit": 2_000_001},
            "Parameter 'downtime_limit' expects an integer in the range of 0 to"
            " (2000 * 1000) ms",
        ),
        (
            {"announce-step": 0},
            "Parameter 'announce_step' expects a value between 0 and 10000",
        ),
        (
            {"max-cpu-throttle": 40, "cpu-throttle-initial": 50},
            "Parameter 'max_cpu_throttle' expects an integer in the range of"
            " cpu_throttle_initial to 99",
        ),
        (
            {"mode": "cpr-reboot"},
            "Parameter 'mode' does not support anything but 'normal'",
        ),
    ],
)
def test_parameters_refused(wanted: dict[str, int | str], text: str) -> None:
    settings = Settings()
    told = []
    settings.changed = lambda: told.append(True)
    before = settings.parameters()
    with pytest.raises(CommandError) as error:
        settings.set_parameters({"max-bandwidth": 1, **wanted})
    assert str(error.value) == text
    assert settings.parameters() == before
    assert not told


def test_bounds_are_taken() -> None:
    settings = Settings()
    settings.set_parameters({"downtime-limit": 2_000_000, "announce-step": 10_000})
    settings.set_parameters({"downtime-limit": 0, "announce-step": 1})
    assert settings.number("downtime-limit") == 0
