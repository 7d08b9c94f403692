"""What a daemon is told when it starts: the guest, the sockets, the switches."""

from __future__ import annotations

import argparse
import grp
import sys
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from common import address
from common.guest.parked import RamFile, parse_size
from common.qmp import schema
from common.qmp.session import CommandError
from common.settings import Settings
from common.tuning import USUAL, Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.qmp.message import Json

FILES: Final = (*schema.FILES, "config.json")

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

    The source has `track` and `preempt_early`; the destination has `incoming`,
    `copy` and `overcommit`. `parameters` are migration parameters to begin with.
    """

    guest: GuestConfig
    qmp: tuple[str, ...]
    qmp_group: int | None = None
    track: bool = True
    preempt_early: bool = False
    incoming: str | None = None
    copy: bool = False
    overcommit: bool = False
    tuning: Tuning = USUAL
    parameters: Mapping[str, Json] = field(default_factory=dict)


# --- options and file -------------------------------------------------------------


def parse_options(
    program: str, description: str, kind: str, words: list[str] | None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read `serve` and its options, which the type `kind` of the schema lists.

    What the file behind `--config` says comes first, as if it were written on
    the command line. Usage errors end the process with status 2. The namespace
    has `parameters` besides: the file's, checked.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="run the daemon")
    add_option = serve.add_argument
    add_option("--config", metavar="FILE", help="options in TOML; these here win")
    known = schema.load(FILES)
    described = known.object(kind)
    for member in described.members:
        _add_option(serve, member)
    given = sys.argv[1:] if words is None else words
    content = _content(serve, _file_named(given))
    parameters = content.pop("parameters", {})
    try:
        described.check_arguments({"qmp": [], **content})
        known.object("MigrationParameters").check(parameters, "parameters")
        if parameters:
            Settings().set_parameters(parameters)
    except CommandError as error:
        serve.error(f"--config: {error.desc}")
    found = parser.parse_args([*given[:1], *_words(content), *given[1:]])
    found.parameters = parameters
    return serve, found


def _add_option(parser: argparse.ArgumentParser, member: schema.Member) -> None:
    option: dict[str, Any] = {"help": member.doc, "default": member.default}
    if member.default:
        option["help"] += f" (default {member.default})"
    if isinstance(member.type, schema.Enum):
        option["choices"] = tuple(member.type.values)
    elif isinstance(member.type, schema.Array):
        option |= {"action": "append", "default": []}
    if member.type is schema.BUILTIN["bool"]:
        option["action"] = "store_true"
    elif member.type is schema.BUILTIN["int"]:
        option["type"] = int
    elif member.name in _READ:
        option["type"] = _READ[member.name]
    parser.add_argument(f"--{member.name}", required=not member.optional, **option)


def _file_named(words: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    name: str | None = parser.parse_known_args(words)[0].config
    return name


def _content(parser: argparse.ArgumentParser, path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        parser.error(f"--config: {path}: {error}")


def _words(content: Mapping[str, Json]) -> list[str]:
    """A file's members as they would be written on the command line."""
    words = []
    for name, value in content.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        else:
            several = value if isinstance(value, list) else [value]
            words += [f"--{name}={one}" for one in several]
    return words


def guest_config(
    parser: argparse.ArgumentParser, found: argparse.Namespace, *, kernel: str | None
) -> GuestConfig:
    """Check the guest's options against each other; a usage error ends here."""
    kinds = [found.memory is not None, bool(found.ram), found.guest is not None]
    if sum(kinds) != 1:
        parser.error("give one of --memory, --ram and --guest")
    if not 1 <= found.vcpus <= 8:
        parser.error("--vcpus must be 1 to 8")
    if found.serial != "stdout" and not found.serial.startswith("file:"):
        parser.error("--serial must be stdout or file:PATH")
    return GuestConfig(
        name=found.name,
        ram=tuple(found.ram),
        socket=found.guest,
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


def _incoming(uri: str) -> str:
    if uri != "defer":
        try:
            address.parse(uri)
        except address.AddressError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return uri


# What a text stands for, where the schema knows only that it is one.
_READ: Final[Mapping[str, Callable[[str], object]]] = {
    "memory": _size,
    "ram": _ram_file,
    "qmp-group": _group,
    "incoming": _incoming,
}
