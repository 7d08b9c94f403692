"""Writes what the documents have from the sources: run it after changing them.

    docs/qmp-reference.md    commands, events and types, from qmp_schema/
    docs/configuration.md    the daemons' options and configuration file, likewise
    docs/architecture.md     the statuses, from common/status.py, between markers

Run as `python docs/generate.py` from anywhere; with `--check` it writes nothing
and ends with status 1 if a file is not what it would write.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import recovery, status  # noqa: E402 - the checkout's, not installed
from common.qmp import message, schema  # noqa: E402
from common.qmp.schema import (  # noqa: E402
    BUILTIN,
    Alternate,
    Array,
    Command,
    Enum,
    Member,
    Object,
    Type,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from common.qmp.message import Json
    from common.status import S, Table

BY: Final = "docs/generate.py"
REFERENCE: Final = ROOT / "docs" / "qmp-reference.md"
CONFIGURATION: Final = ROOT / "docs" / "configuration.md"
ARCHITECTURE: Final = ROOT / "docs" / "architecture.md"

HEAD: Final = f"""# QMP reference

<!-- Made by {BY} from qmp_schema/; changes here are lost. -->

Commands, events and types of the control sockets of `srcd` and `dstd`. They are
QEMU 10.0.2's, with the same names, types and error texts; what differs on purpose
is in [qmp-differences.md](qmp-differences.md). Both daemons have every command; one
that makes no sense for the side answers with the error that QEMU gives there.

A question mark behind a name: it may be left out. `[T]` is an array of T. *oob*: it
may be executed out of band, with `exec-oob`. All sizes are bytes.
"""

CONFIGURATION_HEAD: Final = f"""# Configuration

<!-- Made by {BY} from qmp_schema/config.json; changes here are lost. -->

What a daemon is told when it starts. Every name is an option of `srcd serve` and
`dstd serve` (`--memory 4G`), and a member of the file that `--config FILE` names, in
TOML:

```toml
qmp = ["/run/postcopyd/vm.qmp"]
memory = "4G"

[parameters]
max-bandwidth = 0
```

An option on the command line wins over the file; those that may be given more than
once add up. The table `parameters` has migration parameters to begin with, with the
names and values of
[migrate-set-parameters](qmp-reference.md#migrationparameters). One of `memory`, `ram`
and `guest` says which guest it is.
"""
RECOVERY_HEAD: Final = """## [recovery]

Whether a postcopy that paused goes on without being asked, and how often that is
tried; see [recovery.md](recovery.md#automatic-recovery). These are migration
parameters of ours, with `x-postcopyd-recovery-` in front, so they can be changed and
read like all others while the daemon runs. A table in the file of both daemons:

```toml
[recovery]
auto = true
greatest-delay = 60
```
"""
CONFIGURATION_PARTS: Final = {
    "Config": "Both daemons",
    "SourceConfig": "srcd",
    "DestinationConfig": "dstd",
}

GROUPS: Final = {
    "control.json": "The monitor",
    "guest.json": "The guest",
    "migration.json": "Migration",
}


# --- the reference ---------------------------------------------------------------


class Reference:
    """The schema as Markdown."""

    def __init__(self, files: Sequence[str] = schema.FILES) -> None:
        self._all = schema.load(files)
        builtin = {id(kind): name for name, kind in BUILTIN.items()}
        own = {id(kind): name for name, kind in self._all.types.items()}
        self._names = builtin | own

    def text(self) -> str:
        parts = [HEAD, *self._commands(), *self._events(), *self._types()]
        return "\n".join(parts)

    def _commands(self) -> Iterator[str]:
        for file, title in GROUPS.items():
            known = schema.load([*_before(file), file])
            earlier = schema.load(_before(file)).commands if _before(file) else {}
            yield f"## {title}\n"
            for name, command in known.commands.items():
                if name not in earlier and name == command.target:
                    yield from self._command(self._all.commands[name])

    def _command(self, command: Command) -> Iterator[str]:
        yield f"### {command.name}\n"
        yield f"{command.doc}{_marks(command.features)}\n"
        aliases = [
            f"`{other.name}`"
            for other in self._all.commands.values()
            if other.target == command.name != other.name
        ]
        if aliases:
            yield f"Also called {', '.join(aliases)}.\n"
        if command.allow_oob:
            yield "*oob*\n"
        yield from self._members(command.arguments, "Argument")
        if command.alternative is not None:
            yield f"Or the members of {self._link(command.alternative)}.\n"
        if command.returns is not schema.EMPTY:
            yield f"Returns {self._link(command.returns)}.\n"

    def _events(self) -> Iterator[str]:
        yield "## Events\n"
        for event in self._all.events.values():
            yield f"### {event.name}\n"
            yield f"{event.doc}\n"
            yield from self._members(event.data, "Member")

    def _types(self) -> Iterator[str]:
        yield "## Types\n"
        for name, kind in sorted(self._all.types.items()):
            if name.startswith("[") or name in BUILTIN:
                continue
            yield f"### {name}\n"
            yield from self._type(kind)

    def _type(self, kind: Type) -> Iterator[str]:
        if isinstance(kind, Enum):
            yield from _table(
                ("Value", ""),
                (
                    (f"`{name}`", note.doc + _marks(note.features))
                    for name, note in kind.values.items()
                ),
            )
        elif isinstance(kind, Alternate):
            yield " or ".join(map(self._link, kind.types)) + "\n"
        elif isinstance(kind, Object):
            yield from self._members(kind, "Member", inline=False)
            for case, variant in kind.variants.items():
                yield f"With `{kind.tag}` `{case}`: {self._link(variant)}.\n"

    def configuration(self) -> str:
        """The members of the configuration file, which are options too."""
        parts = [CONFIGURATION_HEAD]
        for kind, title in CONFIGURATION_PARTS.items():
            parts.append(f"## {title}\n")
            seen = {m.name for m in self._all.object("Config").members}
            own = self._all.object(kind).members
            rows = [
                self._option(member)
                for member in own
                if kind == "Config" or member.name not in seen
            ]
            parts += _table(("Name", "Type", "Default", ""), iter(rows))
        parts.append(RECOVERY_HEAD)
        rows = [self._option(member) for member in recovery.table(self._all).members]
        parts += _table(("Name", "Type", "Default", ""), iter(rows))
        return "\n".join(parts)

    def _option(self, member: Member) -> Sequence[str]:
        kind = member.type
        if isinstance(kind, Enum):
            shown = " or ".join(f"`{value}`" for value in kind.values)
        else:
            shown = self._link(kind)
        default = "" if member.default is None else f"`{_json(member.default)}`"
        return f"`{member.name}`", shown, default, member.doc

    def _members(
        self, kind: Object, title: str, *, inline: bool = True
    ) -> Iterator[str]:
        if inline and id(kind) in self._names:
            yield f"{title}s: the members of {self._link(kind)}.\n"
        elif kind.members:
            rows = (self._member(member) for member in kind.members)
            yield from _table((title, "Type", "Default", "Range", ""), rows)

    def _member(self, member: Member) -> Sequence[str]:
        mark = "?" if member.optional else ""
        default = "" if member.default is None else f"`{_json(member.default)}`"
        return (
            f"`{member.name}`{mark}",
            self._link(member.type),
            default,
            _range(member),
            member.doc + _marks(member.features),
        )

    def _link(self, kind: Type) -> str:
        if isinstance(kind, Array):
            return f"[{self._link(kind.element)}]"
        name = self._names[id(kind)]
        return name if name in BUILTIN else f"[{name}](#{name.lower()})"


def _before(file: str) -> list[str]:
    """The files that `file` may refer to, and those that are shown above it."""
    order = list(GROUPS)
    return order[: order.index(file)]


def _range(member: Member) -> str:
    if member.range is None:
        return ""
    low, high = member.range.low, member.range.high
    bounds = f"{low} to {high}" if high != 2**64 - 1 else f"at least {low}"
    return f"a power of two, {bounds}" if member.range.power_of_two else bounds


def _marks(features: Sequence[str]) -> str:
    return "".join(f" *{feature}*" for feature in features)


def _json(value: Json) -> str:
    return message.encode_text(value)


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """A table without the columns in which nothing stands."""
    cells = [head, *rows]
    used = [i for i in range(len(head)) if any(row[i] for row in cells[1:])]
    lines = ["| " + " | ".join(row[i] for i in used) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(used))
    yield "\n".join(lines) + "\n"


# --- the statuses ----------------------------------------------------------------


def arrows(table: Table[S]) -> str:
    """A table of transitions as text: what may follow what."""
    width = max(len(state) for state, after in table.items() if after)
    lines = [
        f"{state:{width}} -> {' '.join(s for s in _order(table) if s in after)}"
        for state, after in table.items()
        if after
    ]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def diagram(table: Table[S]) -> str:
    """The same as a drawing."""
    first, *_ = table
    ends = [
        state for state, after in table.items() if not after and _reached(table, state)
    ]
    lines = [
        "stateDiagram-v2",
        *(
            f"    state {_json(state)} as {_id(state)}"
            for state, after in table.items()
            if "-" in state and (after or _reached(table, state))
        ),
        f"    [*] --> {_id(first)}",
        *(
            f"    {_id(state)} --> {_id(new)}"
            for state, after in table.items()
            for new in _order(table)
            if new in after
        ),
        *(f"    {_id(state)} --> [*]" for state in ends),
    ]
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def _id(state: str) -> str:
    """Mermaid's names have no dashes."""
    return state.replace("-", "_")


def _order(table: Table[S]) -> list[S]:
    return list(table)


def _reached(table: Table[S], state: S) -> bool:
    return any(state in after for after in table.values())


TABLES: Final[Mapping[str, Table[Any]]] = {
    "source": status.OUTGOING,
    "destination": status.INCOMING,
    "incoming postcopy": status.POSTCOPY,
}


def with_statuses(text: str) -> str:
    """The document with the parts between the markers made anew."""
    for name, table in TABLES.items():
        start = f"<!-- {name}: made by {BY} from common/status.py -->\n"
        end = f"<!-- end of {name} -->\n"
        before, begins, rest = text.partition(start)
        _, ends, after = rest.partition(end)
        if not (begins and ends):
            raise SystemExit(f"{ARCHITECTURE} lacks the markers of {name}")
        made = f"\n{arrows(table)}\n{diagram(table)}\n"
        text = before + start + made + end + after
    return text


# --- writing ---------------------------------------------------------------------


def files() -> dict[Path, str]:
    """What every generated file should hold."""
    return {
        REFERENCE: Reference().text(),
        CONFIGURATION: Reference((*schema.FILES, "config.json")).configuration(),
        ARCHITECTURE: with_statuses(ARCHITECTURE.read_text()),
    }


def main(arguments: list[str]) -> int:
    stale = [
        (path, text)
        for path, text in files().items()
        if not path.exists() or path.read_text() != text
    ]
    if arguments == ["--check"]:
        for path, _ in stale:
            print(f"{path.relative_to(ROOT)} is not current; run {BY}")
        return 1 if stale else 0
    for path, text in stale:
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
