"""The human monitor: one line of text in, what it prints out.

A table of lines, each of which is one QMP command with its arguments found in
the text. It prints what QEMU's prints; scripts read it. The lines that begin
with `info` are in hmp_info.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from common.qmp import schema
from common.qmp.hmp_info import INFOS
from common.qmp.human_values import NO_SIZE, SIZE_HINT
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from common.qmp.message import Json
    from common.qmp.server import Handler

END: Final = "\r\n"
SYNCHRONOUS: Final = (
    "terminal does not allow synchronous migration, continuing detached"
)
_ESCAPES: Final = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_BLANK: Final = " \t\n\r\v\f"

Words: TypeAlias = "Mapping[str, Json]"
Run: TypeAlias = "Callable[[HumanMonitor, Words], Awaitable[Sequence[str]]]"


class LineError(Exception):
    """A line that cannot be read; says why and where to find help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line: its names, its options (letters) and its words.

    A word is `name:type`: s a text, b on or off, i a number; with `?` it may be
    missing.
    """

    name: str
    options: str = ""
    words: Sequence[str] = ()
    usage: str = ""
    doc: str
    run: Run

    @property
    def names(self) -> Sequence[str]:
        return self.name.split("|")

    def help(self) -> str:
        return f"{self.name} {self.usage} -- {self.doc}"


class HumanMonitor:
    """Runs lines by the same handlers that QMP uses.

    `check_uri` raises CommandError for an address that cannot be read; QEMU
    reads it before it looks at anything else. `version` is what query-version
    returns.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        cpus: int = 1,
        check_uri: Callable[[str], object] = lambda uri: None,
    ) -> None:
        self._handlers = handlers
        self._commands = schema.load().commands
        self._cpus = max(cpus, 1)
        self.check_uri = check_uri
        self.version: Mapping[str, Json] = {}

    async def command(self, arguments: Mapping[str, Json]) -> Json:
        """The handler of `human-monitor-command`."""
        if not 0 <= int(str(arguments.get("cpu-index", 0))) < self._cpus:
            raise CommandError("Parameter 'cpu-index' expects a CPU number")
        return await self.run(str(arguments["command-line"]))

    async def run(self, text: str) -> str:
        """What the line prints; its errors too."""
        return "".join(line + END for line in await self._run(_Reader(text)))

    async def ask(self, name: str, arguments: Mapping[str, Json]) -> Json:
        """Run a QMP command, with the checks that QMP makes."""
        if name == "query-version":
            return self.version
        self._commands[name].check(arguments)
        return await self._handlers[name](dict(arguments))

    async def _run(self, reader: _Reader) -> Sequence[str]:
        name = reader.name()
        if not name:
            return ()
        if name == "info":
            return await self._info(reader)
        line = LINES.get(name)
        if line is None:
            return [f"unknown command: '{name}'"]
        try:
            words = reader.words(line.name, line.options, line.words)
        except LineError as error:
            return [str(error), f'Try "help {name}" for more information']
        return await self._guarded(line.run(self, words))

    async def _info(self, reader: _Reader) -> Sequence[str]:
        name = reader.name()
        if not name:
            return _help_info()
        info = INFOS.get(name)
        if info is None:
            return [f"unknown command: 'info {name}'"]
        try:
            reader.words(name, "", ())
        except LineError as error:
            return [str(error), f'Try "help info {name}" for more information']
        return await self._guarded(info.show(self.ask))

    async def _guarded(self, work: Awaitable[Sequence[str]]) -> Sequence[str]:
        try:
            return await work
        except CommandError as error:
            hint = SIZE_HINT if error.desc.endswith(NO_SIZE[-30:]) else ()
            return [f"Error: {error.desc}", *hint]


# --- reading a line ---------------------------------------------------------------


class _Reader:
    """Takes a line apart from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    @property
    def _rest(self) -> str:
        """What is left, from its first letter on."""
        rest = self._text[self._at :].lstrip(_BLANK)
        self._at = len(self._text) - len(rest)
        return rest

    def name(self) -> str:
        """The name of a command, nothing at the end."""
        return self._bare()

    def words(self, name: str, options: str, words: Sequence[str]) -> Words:
        """Every option and word of a line called `name`; LineError."""
        found: dict[str, Json] = dict(self._options(name, options))
        for word in words:
            key, _, kind = word.partition(":")
            if not self._rest and kind.endswith("?"):
                continue
            found[key] = _KINDS[kind[0]](self, name)
        if self._rest:
            raise LineError(f"{name}: extraneous characters at the end of line")
        return found

    def _options(self, name: str, options: str) -> dict[str, bool]:
        found = dict.fromkeys(options, False)
        while options and self._rest.startswith("-") and len(self._rest) > 1:
            letter = self._rest[1]
            if letter not in options:
                raise LineError(f"{name}: unsupported option -{letter}")
            if found[letter]:
                break
            found[letter] = True
            self._at += 2
        return found

    def string(self, name: str) -> str:
        if not self._rest:
            raise LineError(f"{name}: string expected")
        return self._quoted() if self._rest.startswith('"') else self._bare()

    def switch(self, name: str) -> bool:
        word = self._bare()
        if word not in ("on", "off"):
            raise LineError("Expected 'on' or 'off'")
        return word == "on"

    def number(self, name: str) -> int:
        word = self._bare()
        if not word:
            raise LineError("unexpected end of expression")
        try:
            return int(word, 0)
        except ValueError:
            wrong = next((c for c in word if c not in "0123456789"), word[0])
            raise LineError(f"invalid char '{wrong}' in expression") from None

    def _bare(self) -> str:
        words = self._rest.split(maxsplit=1)
        self._at += len(words[0]) if words else 0
        return words[0] if words else ""

    def _quoted(self) -> str:
        found: list[str] = []
        self._at += 1
        while self._at < len(self._text):
            letter = self._text[self._at]
            self._at += 1
            if letter == '"':
                return "".join(found)
            if letter == "\\":
                letter = self._escape()
            found.append(letter)
        raise LineError("unterminated string literal")

    def _escape(self) -> str:
        letter = self._text[self._at : self._at + 1]
        self._at += 1
        if letter not in _ESCAPES:
            raise LineError(f"unsupported escape code: '\\{letter}'")
        return _ESCAPES[letter]


_KINDS: Final[Mapping[str, Callable[[_Reader, str], Json]]] = {
    "s": _Reader.string,
    "b": _Reader.switch,
    "i": _Reader.number,
}


# --- the lines --------------------------------------------------------------------


def _plain(name: str, **fixed: Json) -> Run:
    """A line whose words are the command's arguments, and which prints nothing."""

    async def run(monitor: HumanMonitor, words: Words) -> Sequence[str]:
        await monitor.ask(name, {**words, **fixed})
        return ()

    return run


async def _migrate(monitor: HumanMonitor, words: Words) -> Sequence[str]:
    uri = words["uri"]
    monitor.check_uri(str(uri))
    await monitor.ask("migrate", {"uri": uri, "resume": words["r"]})
    return () if words["d"] else (SYNCHRONOUS,)


async def _migrate_incoming(monitor: HumanMonitor, words: Words) -> Sequence[str]:
    monitor.check_uri(str(words["uri"]))
    await monitor.ask("migrate-incoming", {**words, "exit-on-error": False})
    return ()


async def _set_capability(monitor: HumanMonitor, words: Words) -> Sequence[str]:
    _known("MigrationCapability", words["capability"])
    await monitor.ask("migrate-set-capabilities", {"capabilities": [words]})
    return ()


async def _set_parameter(monitor: HumanMonitor, words: Words) -> Sequence[str]:
    _known("MigrationParameter", words["parameter"])
    await monitor.ask("migrate_set_parameter", words)
    return ()


async def _continue(monitor: HumanMonitor, words: Words) -> Sequence[str]:
    _known("MigrationStatus", words["state"])
    await monitor.ask("migrate-continue", words)
    return ()


async def _calc_dirty_rate(monitor: HumanMonitor, words: Words) -> Sequence[str]:
    seconds = words["seconds"]
    if not seconds:
        return ("Incorrect period length specified!",)
    if words["r"] and words["b"]:
        return ("Either dirty ring or dirty bitmap can be specified!",)
    mode = "dirty-ring" if words["r"] else "dirty-bitmap" if words["b"] else None
    order: dict[str, Json] = {"calc-time": seconds}
    if mode:
        order["mode"] = mode
    if "samples" in words:
        order["sample-pages"] = words["samples"]
    await monitor.ask("calc-dirty-rate", order)
    return (
        f"Starting dirty rate measurement with period {seconds} seconds",
        "[Please use 'info dirty_rate' to check results]",
    )


async def _help(_: HumanMonitor, words: Words) -> Sequence[str]:
    name = words.get("name")
    if name == "info":
        return _help_info()
    if name is not None:
        line = LINES.get(str(name))
        return [line.help()] if line else [f"unknown command: '{name}'"]
    shown = {line.name: line.help() for line in LINES.values()}
    shown["info"] = "info [subcommand] -- show various information about the guest"
    return [shown[key] for key in sorted(shown)]


def _help_info() -> Sequence[str]:
    return [f"info {name}  -- {info.doc}" for name, info in sorted(INFOS.items())]


def _known(enum: str, name: Json) -> None:
    if name not in schema.load().enum(enum):
        raise CommandError(f"invalid parameter value: {name}")


_TABLE: Final = (
    Line(
        name="calc_dirty_rate",
        options="rb",
        words=("seconds:i", "samples:i?"),
        usage="[-r] [-b] second [sample_pages_per_GB]",
        doc="measure how fast the guest dirties memory (-b: by a dirty bitmap)",
        run=_calc_dirty_rate,
    ),
    Line(
        name="closefd",
        words=("fdname:s",),
        usage="name",
        doc="close a descriptor that was passed with getfd",
        run=_plain("closefd"),
    ),
    Line(name="cont|c", doc="let the guest run", run=_plain("cont")),
    Line(
        name="getfd",
        words=("fdname:s",),
        usage="name",
        doc="name the descriptor that came with this request",
        run=_plain("getfd"),
    ),
    Line(
        name="help|?",
        words=("name:s?",),
        usage="[cmd]",
        doc="show the help",
        run=_help,
    ),
    Line(
        name="migrate",
        options="dr",
        words=("uri:s",),
        usage="[-d] [-r] uri",
        doc="migrate to URI (-d: do not wait; -r: resume a paused postcopy)",
        run=_migrate,
    ),
    Line(
        name="migrate_cancel",
        doc="cancel the migration",
        run=_plain("migrate_cancel"),
    ),
    Line(
        name="migrate_continue",
        words=("state:s",),
        usage="state",
        doc="let a migration go on that is held in that state",
        run=_continue,
    ),
    Line(
        name="migrate_incoming",
        words=("uri:s",),
        usage="uri",
        doc="listen for a migration",
        run=_migrate_incoming,
    ),
    Line(
        name="migrate_pause",
        doc="break the connection of a postcopy on purpose",
        run=_plain("migrate-pause"),
    ),
    Line(
        name="migrate_recover",
        words=("uri:s",),
        usage="uri",
        doc="listen for the source of a paused postcopy",
        run=_plain("migrate-recover"),
    ),
    Line(
        name="migrate_set_capability",
        words=("capability:s", "state:b"),
        usage="capability state",
        doc="switch a capability on or off",
        run=_set_capability,
    ),
    Line(
        name="migrate_set_parameter",
        words=("parameter:s", "value:s"),
        usage="parameter value",
        doc="set a parameter",
        run=_set_parameter,
    ),
    Line(
        name="migrate_start_postcopy",
        doc="switch a running migration to postcopy",
        run=_plain("migrate-start-postcopy"),
    ),
    Line(
        name="pmemsave",
        words=("val:i", "size:i", "filename:s"),
        usage="addr size file",
        doc="save guest physical memory to a file",
        run=_plain("pmemsave"),
    ),
    Line(name="quit|q", doc="end the daemon", run=_plain("quit")),
    Line(name="stop|s", doc="stop the guest", run=_plain("stop")),
)
LINES: Final[Mapping[str, Line]] = {
    name: line for line in _TABLE for name in line.names
}
