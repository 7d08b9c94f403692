"""The source daemon's command line; its options are in qmp_schema/config.json."""

from __future__ import annotations

from common.config import (
    Question,
    ServeConfig,
    guest_config,
    parse_options,
    question,
    tuning_config,
)


def parse(arguments: list[str] | None = None) -> ServeConfig | Question:
    """What to serve or to answer; usage errors end the process with status 2."""
    serve, found = parse_options(
        "srcd", "Move a running guest away from this host.", "SourceConfig", arguments
    )
    if found.verb != "serve":
        return question(found, parse)
    kernel = found.kernel or _test_guest()
    return ServeConfig(
        guest=guest_config(serve, found, kernel=kernel),
        qmp=tuple(found.qmp),
        sockets=found.sockets,
        file=found.file,
        qmp_group=found.qmp_group,
        track=found.dirty_tracking != "none",
        preempt_early=found.preempt_early,
        tuning=tuning_config(serve, found),
        parameters=found.parameters,
    )


def _test_guest() -> str:
    from common.guest.microvm import program

    return str(program("test-guest.elf"))
