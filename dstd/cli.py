"""The destination daemon's command line; its options are in qmp_schema/config.json."""

from __future__ import annotations

from common.config import ServeConfig, guest_config, parse_options
from common.tuning import Tuning


def parse(arguments: list[str] | None = None) -> ServeConfig:
    """What to serve; usage errors end the process with status 2."""
    serve, found = parse_options(
        "dstd", "Receive a running guest on this host.", "DestinationConfig", arguments
    )
    return ServeConfig(
        guest=guest_config(serve, found, kernel=None),
        qmp=tuple(found.qmp),
        qmp_group=found.qmp_group,
        incoming=found.incoming,
        copy=found.place == "copy",
        overcommit=found.overcommit,
        tuning=Tuning(awake=not found.let_sleep),
        parameters=found.parameters,
    )
