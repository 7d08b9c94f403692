"""The destination daemon's command line."""

from __future__ import annotations

import argparse

from common import address
from common.config import ServeConfig, add_guest_arguments, guest_config


def parse(arguments: list[str] | None = None) -> ServeConfig:
    """What to serve; usage errors end the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="dstd", description="Receive a running guest on this host."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="run the daemon")
    add_guest_arguments(serve)
    serve.add_argument(
        "--incoming",
        type=_incoming,
        default="defer",
        metavar="URI",
        help="listen there at once; defer (default) waits for migrate-incoming",
    )
    serve.add_argument(
        "--place",
        choices=("auto", "copy"),
        default="auto",
        help="how pages get into the guest; copy: as on kernels before 5.14",
    )
    serve.add_argument(
        "--overcommit",
        action="store_true",
        help="accept a guest with more RAM than this host has available",
    )
    found = parser.parse_args(arguments)
    return ServeConfig(
        guest=guest_config(serve, found, kernel=None),
        qmp=tuple(found.qmp),
        qmp_group=found.qmp_group,
        incoming=found.incoming,
        copy=found.place == "copy",
        overcommit=found.overcommit,
    )


def _incoming(uri: str) -> str:
    if uri != "defer":
        try:
            address.parse(uri)
        except address.AddressError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return uri
