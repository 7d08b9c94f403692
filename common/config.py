"""What a daemon is told when it starts: the guest, the sockets, the switches."""

from __future__ import annotations

import argparse
import grp
from dataclasses import dataclass

from common.guest.parked import RamFile, parse_size

DEFAULT_MACHINE = "postcopyd-1"
PARKED_MACHINE = "none"  # QEMU's machine without CPUs and devices


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """Which guest: exactly one of `ram`, `socket` and the built-in one (neither).

    `memory` in bytes. `kernel` is the program of the built-in guest.
    """

    name: str | None
    ram: tuple[RamFile, ...]
    socket: str | None
    machine: str | None
    memory: int | None
    vcpus: int
    accel: str
    hugepages: str | None
    kernel: str | None
    append: str
    serial: str
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One daemon: its guest, its control sockets, and what only one side has.

    The source has `track` and `preempt_early`, the destination the rest.
    """

    guest: GuestConfig
    qmp: tuple[str, ...]
    qmp_group: int | None = None
    track: bool = True
    preempt_early: bool = False
    incoming: str | None = None
    copy: bool = False
    overcommit: bool = False


def add_guest_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that both daemons have."""
    add = parser.add_argument
    add("--name", help="the guest's name, for query-name")
    add(
        "--qmp",
        action="append",
        required=True,
        metavar="SOCKET",
        help="serve the control protocol here; may be given more than once",
    )
    add(
        "--qmp-group",
        type=_group,
        metavar="GROUP",
        help="who else may connect to the control sockets, by name or number",
    )
    guest = parser.add_argument_group("the guest")
    add = guest.add_argument
    add("--memory", type=_size, metavar="SIZE", help="RAM of the built-in guest")
    add("--vcpus", type=int, default=1, metavar="N", help="1 to 8 (default 1)")
    add("--hugepages", choices=("2M",), help="back its RAM with huge pages")
    add(
        "--accel",
        choices=("auto", "kvm", "process"),
        default="auto",
        help="how it runs; process: as threads, without /dev/kvm",
    )
    add(
        "--serial",
        default="stdout",
        metavar="WHERE",
        help="its serial output: stdout or file:PATH (default stdout)",
    )
    add("--machine", metavar="NAME", help="machine name in the stream")
    add(
        "--guest",
        dest="socket",
        metavar="SOCKET",
        help="no built-in guest: a VMM attaches here (docs/attach-protocol.md)",
    )
    add(
        "--ram",
        action="append",
        type=_ram_file,
        default=[],
        metavar="NAME=FILE[,size=SIZE]",
        help="no CPUs: a RAM block behind a file; may be given more than once",
    )


def guest_config(
    parser: argparse.ArgumentParser, found: argparse.Namespace, *, kernel: str | None
) -> GuestConfig:
    """Check the guest's options against each other; a usage error ends here."""
    kinds = [found.memory is not None, bool(found.ram), found.socket is not None]
    if sum(kinds) != 1:
        parser.error("give one of --memory, --ram and --guest")
    if not 1 <= found.vcpus <= 8:
        parser.error("--vcpus must be 1 to 8")
    if found.serial != "stdout" and not found.serial.startswith("file:"):
        parser.error("--serial must be stdout or file:PATH")
    return GuestConfig(
        name=found.name,
        ram=tuple(found.ram),
        socket=found.socket,
        machine=found.machine,
        memory=found.memory,
        vcpus=found.vcpus,
        accel=found.accel,
        hugepages=found.hugepages,
        kernel=kernel,
        append=getattr(found, "append", ""),
        serial=found.serial,
        paused=getattr(found, "paused", False),
    )


def _group(text: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"no group is called {text!r}") from None


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _ram_file(text: str) -> RamFile:
    try:
        return RamFile.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
