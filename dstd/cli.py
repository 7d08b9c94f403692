"""The destination daemon's command line; its options are in qmp_schema/config.json."""

from __future__ import annotations

from common.config import (
    Proxy,
    Question,
    ServeConfig,
    guest_config,
    parse_options,
    question,
    tuning_config,
)


def parse(arguments: list[str] | None = None) -> ServeConfig | Question | Proxy:
    """What to serve or to answer; usage errors end the process with status 2."""
    serve, found = parse_options(
        "dstd", "Receive a running guest on this host.", "DestinationConfig", arguments
    )
    if found.verb != "serve":
        return question(found, parse)
    return ServeConfig(
        guest=guest_config(serve, found, kernel=None),
        qmp=tuple(found.qmp),
        sockets=found.sockets,
        file=found.file,
        qmp_group=found.qmp_group,
        incoming=found.incoming,
        copy=found.place == "copy",
        overcommit=found.overcommit,
        tuning=tuning_config(serve, found),
        parameters=found.parameters,
    )
