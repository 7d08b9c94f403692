"""What a daemon is told when it starts: the guest, the sockets, the switches."""

from __future__ import annotations

import argparse
import difflib
import grp
import sys
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from common import address, recovery
from common.guest.parked import RamFile, parse_size
from common.host import systemd
from common.qmp import schema
from common.qmp.session import CommandError
from common.settings import Settings
from common.tuning import USUAL, Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from common.qmp.message import Json

FILES: Final = (*schema.FILES, "config.json")

DEFAULT_MACHINE = "postcopyd-1"
PARKED_MACHINE = "none"  # QEMU's machine without CPUs and devices
PEER_TIMEOUT_MAX: Final = 3600  # seconds
LEARN_MAX: Final = 3600  # seconds
# What `FileDescriptorName=` calls the control sockets in our .socket units.
CONTROL_SOCKET: Final = "control"


class ConfigError(Exception):
    """A configuration file that cannot be used; one sentence that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """Which guest: one of `ram`, `socket`, `park`, `parked` and the built-in one
    (none of them). `park` is the directory to put it into; the destination's only.
    `parked`, the source's, is the one to serve it from: as a `clone` any number of
    times, `lazy` while it runs already, and remembering its `working_set`, of
    which it is to `learn` for so many seconds.

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
    park: str | None = None
    parked: str | None = None
    clone: bool = False
    lazy: bool = False
    working_set: bool = True
    learn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One daemon: its guest, its control sockets, and what only one side has.

    The source has `track` and `preempt_early`; the destination has `incoming`,
    `copy` and `overcommit`. `parameters` are migration parameters to begin with.
    `sockets` are descriptors of control sockets that the service manager made,
    `stored` those that it kept for us.
    """

    guest: GuestConfig
    qmp: tuple[str, ...]
    sockets: tuple[int, ...] = ()
    file: ConfigFile | None = None
    qmp_group: int | None = None
    track: bool = True
    preempt_early: bool = False
    incoming: str | None = None
    copy: bool = False
    overcommit: bool = False
    tuning: Tuning = USUAL
    parameters: Mapping[str, Json] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=systemd.stored)

    @property
    def control(self) -> str:
        """Where the first control socket is; the built-in guest attaches beside it."""
        return self.qmp[0] if self.qmp else systemd.path_of(self.sockets[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What a file said when it was read: options by name, migration parameters.

    What the table `[recovery]` has is among the parameters.

    `kind` is the type of the schema that its options are checked with.
    """

    path: str
    kind: str
    options: Mapping[str, Json]
    parameters: Mapping[str, Json]

    def again(self) -> ConfigFile:
        """What it says now; ConfigError if that cannot be used."""
        return read_file(self.path, self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Not to serve, but to answer: is this file right, or can this host migrate?

    `about` is `check` or `check-config`. The file was right if we got here.
    """

    about: str
    path: str | None
    config: ServeConfig | None


@dataclass(frozen=True, slots=True)
class Proxy:
    """Not to serve, but to join this process's ends with the control socket there."""

    socket: str


# --- the file ------------------------------------------------------------------------


def read_file(path: str, kind: str) -> ConfigFile:
    """Read and check a file against the type `kind`; ConfigError names the fault."""
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {reason}") from None
    parameters = content.pop("parameters", {})
    recover = content.pop(recovery.TABLE, {})
    known = schema.load(FILES)
    try:
        known.object(kind).check_arguments({"qmp": [], **content})
        known.object("MigrationParameters").check(parameters, "parameters")
        recovery.table(known).check(recover, recovery.TABLE)
        parameters = {**parameters, **recovery.parameters(recover)}
        if parameters:
            Settings().set_parameters(parameters)
    except CommandError as error:
        meant = ""
        if error.desc.endswith("is unexpected"):
            meant = _suggestion(known, kind, content, parameters, recover)
        raise ConfigError(f"{path}: {error.desc}{meant}") from None
    return ConfigFile(path=path, kind=kind, options=content, parameters=parameters)


def _suggestion(
    known: schema.Schema,
    kind: str,
    content: Mapping[str, Json],
    parameters: Mapping[str, Json],
    recover: Mapping[str, Json],
) -> str:
    """What the first name that nobody knows may have been meant to be."""
    options = [member.name for member in known.object(kind).members]
    settings = [member.name for member in known.object("MigrationParameters").members]
    for name in (one for one in content if one not in options):
        if name in settings:
            return "; it belongs into the table [parameters]"
        return _close_to(name, options)
    attempts = [member.name for member in recovery.table(known).members]
    for given, names in ((parameters, settings), (recover, attempts)):
        for name in (one for one in given if one not in names):
            return _close_to(name, names)
    return ""


def _close_to(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


# --- options -------------------------------------------------------------------------


Verbs: TypeAlias = "argparse._SubParsersAction[_Parser]"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong, and not all that would be right."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse_options(
    program: str,
    description: str,
    kind: str,
    words: list[str] | None,
    add_verbs: Callable[[Verbs], None] = lambda _: None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the verb and, of `serve`, the options that type `kind` lists.

    What the file behind `--config` says comes first, as if it were written on
    the command line. Usage errors end the process with status 2. With `serve`
    the namespace has `file` besides, and `sockets` from the service manager.
    `add_verbs` adds what only one of the daemons has.
    """
    given = sys.argv[1:] if words is None else words
    sockets = systemd.sockets(CONTROL_SOCKET)
    parser = _Parser(prog=program, description=description)
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="run the daemon")
    serve.add_argument("--config", metavar="FILE", help=_CONFIG)
    for member in schema.load(FILES).object(kind).members:
        _add_option(serve, member, enough=bool(sockets) and member.name == "qmp")
    check = verbs.add_parser("check", help="say whether this host can migrate")
    check.add_argument(
        "--config", metavar="FILE", help="what it is to be good enough for"
    )
    check_config = verbs.add_parser("check-config", help="say whether a file is right")
    check_config.add_argument("config", metavar="FILE")
    proxy = verbs.add_parser(
        "proxy", help="join stdin and stdout with a control socket"
    )
    proxy.add_argument("--qmp", metavar="SOCKET", required=True)
    add_verbs(verbs)
    if given[:1] != ["serve"]:
        return serve, parser.parse_args(given)
    file = _read(serve, _file_named(given), kind)
    content = _words(file.options) if file else []
    found = parser.parse_args([*given[:1], *content, *given[1:]])
    found.file, found.sockets = file, sockets
    found.parameters = file.parameters if file else {}
    return serve, found


_CONFIG: Final = "options in TOML; these here win"


def question(
    found: argparse.Namespace, parse: Callable[[list[str]], object]
) -> Question | Proxy:
    """What a verb other than `serve` asks; `parse` reads the daemon's command line.

    A file without control sockets is right: in a unit the manager makes them.
    """
    if found.verb == "proxy":
        return Proxy(found.qmp)
    path: str | None = found.config
    config = parse(["serve", "--qmp=", "--config", path]) if path else None
    assert isinstance(config, ServeConfig | None)
    return Question(about=found.verb, path=path, config=config)


def _add_option(
    parser: argparse.ArgumentParser, member: schema.Member, *, enough: bool
) -> None:
    """`enough`: it may be left out here, whatever the schema says."""
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
    parser.add_argument(
        f"--{member.name}", required=not (member.optional or enough), **option
    )


def _file_named(words: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    name: str | None = parser.parse_known_args(words)[0].config
    return name


def _read(
    parser: argparse.ArgumentParser, path: str | None, kind: str
) -> ConfigFile | None:
    try:
        return read_file(path, kind) if path else None
    except ConfigError as error:
        parser.error(f"--config: {error}")


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
    park: str | None = getattr(found, "park", None)
    kinds = [found.memory is not None, bool(found.ram), found.guest is not None]
    parked: str | None = getattr(found, "parked", None)
    kinds += [park is not None, parked is not None]
    if sum(kinds) != 1:
        other = "--parked" if hasattr(found, "parked") else "--park"
        parser.error(f"give one of --memory, --ram, --guest and {other}")
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
        park=park,
        parked=parked,
        clone=getattr(found, "clone", False),
        lazy=parked is not None and found.restore == "lazy",
        working_set=not getattr(found, "no_working_set", False),
        learn=_learn(parser, found),
    )


def _learn(parser: argparse.ArgumentParser, found: argparse.Namespace) -> int:
    seconds: int = getattr(found, "learn", 0)
    if not 0 <= seconds <= LEARN_MAX:
        parser.error(f"--learn must be 0 to {LEARN_MAX} seconds")
    if seconds and (found.parked is None or found.restore != "lazy"):
        parser.error("--learn goes with --parked and --restore lazy")
    if seconds and found.no_working_set:
        parser.error("--learn remembers what --no-working-set forbids; leave one out")
    return seconds


def tuning_config(parser: argparse.ArgumentParser, found: argparse.Namespace) -> Tuning:
    """What both sides may ask of their hosts; a usage error ends here."""
    if not 0 <= found.peer_timeout <= PEER_TIMEOUT_MAX:
        parser.error(f"--peer-timeout must be 0 to {PEER_TIMEOUT_MAX}")
    return Tuning(
        awake=not found.let_sleep,
        congestion=getattr(found, "congestion", None),
        peer_timeout=found.peer_timeout,
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
