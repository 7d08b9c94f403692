"""The source daemon's command line."""

from __future__ import annotations

import argparse

from common.config import ServeConfig, add_guest_arguments, guest_config


def parse(arguments: list[str] | None = None) -> ServeConfig:
    """What to serve; usage errors end the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="srcd", description="Move a running guest away from this host."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="run the daemon")
    add_guest_arguments(serve)
    serve.add_argument(
        "--kernel",
        metavar="ELF",
        help="64-bit PVH program of the built-in guest (default: the test guest)",
    )
    serve.add_argument("--append", default="", metavar="TEXT", help="its command line")
    serve.add_argument("--paused", action="store_true", help="do not run it yet")
    serve.add_argument(
        "--preempt-early",
        action="store_true",
        help="connect the preempt channel as QEMU 7 does; needed towards QEMU 7",
    )
    serve.add_argument(
        "--dirty-tracking",
        choices=("auto", "none"),
        default="auto",
        help="how writes are noticed; none: as where the kernel cannot tell",
    )
    found = parser.parse_args(arguments)
    kernel = found.kernel or _test_guest()
    return ServeConfig(
        guest=guest_config(serve, found, kernel=kernel),
        qmp=tuple(found.qmp),
        qmp_group=found.qmp_group,
        track=found.dirty_tracking != "none",
        preempt_early=found.preempt_early,
    )


def _test_guest() -> str:
    from common.guest.microvm import program

    return str(program("test-guest.elf"))
