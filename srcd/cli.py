"""The source daemon's command line; its options are in qmp_schema/config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.config import (
    Question,
    ServeConfig,
    guest_config,
    parse_options,
    question,
    tuning_config,
)
from srcd import errand

if TYPE_CHECKING:
    from srcd.errand import Errand


def parse(arguments: list[str] | None = None) -> ServeConfig | Question | Errand:
    """What to serve, to answer or to do; usage errors end us with status 2."""
    serve, found = parse_options(
        "srcd",
        "Move a running guest away from this host.",
        "SourceConfig",
        arguments,
        errand.add_verbs,
    )
    if found.verb in errand.VERBS:
        return errand.errand_of(found)
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
