"""The source daemon's command line; its options are in qmp_schema/config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from common.address import AddressError
from common.config import (
    Proxy,
    Question,
    ServeConfig,
    guest_config,
    parse_options,
    question,
    tuning_config,
)
from srcd import errand
from srcd.ends import Place
from srcd.recover import RecoverOrder, parse_target

if TYPE_CHECKING:
    import argparse

    from common.config import Verbs
    from srcd.errand import Errand

RECOVER_SECONDS: Final = 60.0


def parse(
    arguments: list[str] | None = None,
) -> ServeConfig | Question | Proxy | RecoverOrder | Errand:
    """What to serve, to answer or to do; usage errors end us with status 2."""
    serve, found = parse_options(
        "srcd",
        "Move a running guest away from this host.",
        "SourceConfig",
        arguments,
        _add_verbs,
    )
    if found.verb == "recover":
        return _recover_order(found)
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


def _add_verbs(verbs: Verbs) -> None:
    errand.add_verbs(verbs)
    recover = verbs.add_parser("recover", help="recover a paused postcopy at both ends")
    recover.set_defaults(parser=recover)  # whose usage errors they are
    add = recover.add_argument
    add("--qmp", metavar="SOCKET", required=True, help="of the source, srcd or QEMU")
    add(
        "--peer",
        metavar="PEER",
        required=True,
        help="of the destination: SOCKET, or ssh:HOST[:SOCKET]",
    )
    add("--uri", help="where the destination shall listen; where it did if absent")
    add(
        "--timeout",
        metavar="S",
        type=float,
        default=RECOVER_SECONDS,
        help=f"how long to wait, in seconds (default {RECOVER_SECONDS:g})",
    )


def _recover_order(found: argparse.Namespace) -> RecoverOrder:
    parser: argparse.ArgumentParser = found.parser
    if not found.timeout > 0:
        parser.error("--timeout must be more than 0")
    try:
        return RecoverOrder(
            source=Place.parse(found.qmp, found.qmp),
            destination=Place.parse(found.peer, found.qmp),
            target=parse_target(found.uri) if found.uri else None,
            timeout=found.timeout,
        )
    except AddressError as error:
        parser.error(f"--uri: {error}")
    except ValueError as error:
        parser.error(f"--peer: {error}")


def _test_guest() -> str:
    from common.guest.microvm import program

    return str(program("test-guest.elf"))
