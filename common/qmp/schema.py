"""Loads `qmp_schema`, checks values against it and answers introspection.

A type checks a JSON value and raises CommandError with QEMU's words; `path` is
where the value stands, counted from the arguments (`channels[0].addr.port`).
Checking changes nothing and fills in no defaults: a parameter that was not
given must stay not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Final, Protocol

from common.qmp import message
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from common.qmp.message import Json

FILES: Final = ("control.json", "migration.json", "guest.json")


# --- types -------------------------------------------------------------------


class Type(Protocol):
    """What a value may look like."""

    def check(self, value: Json, path: str) -> None:
        """Raise CommandError unless `value` is of this type."""

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        """What introspection says about it, without its own name."""

    @property
    def own_name(self) -> str | None:
        """The name introspection gives it; None for a number."""


def _wrong_type(path: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{path}', expected: {expected}")


@dataclass(frozen=True, slots=True)
class Builtin:
    """A type that JSON has itself."""

    own_name: str
    json_type: str
    python_types: tuple[type, ...]

    def check(self, value: Json, path: str) -> None:
        fits = isinstance(value, self.python_types)
        if not fits or (isinstance(value, bool) and bool not in self.python_types):
            raise _wrong_type(path, self.json_type)

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        return {"meta-type": "builtin", "json-type": self.json_type}


@dataclass(frozen=True, slots=True)
class AnyValue:
    """No restriction."""

    own_name: str = "any"

    def check(self, value: Json, path: str) -> None:
        pass

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        return {"meta-type": "builtin", "json-type": "value"}


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer of a certain width; introspection knows only `int`."""

    low: int
    high: int
    # The error texts, with a place for the path and one for its last name.
    not_integer: str
    out_of_range: str

    @property
    def own_name(self) -> str:
        return "int"

    def check(self, value: Json, path: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise CommandError(self.not_integer.format(path))
        if not self.low <= value <= self.high:
            name = path.rpartition(".")[2]
            raise CommandError(self.out_of_range.format(path, name))

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        return {"meta-type": "builtin", "json-type": "int"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What is said about a value or a member besides its type."""

    doc: str = ""
    features: Sequence[str] = ()

    def marked(self, entity: Mapping[str, Json]) -> Mapping[str, Json]:
        """`entity` with the features added, if there are any."""
        return {**entity, "features": self.features} if self.features else entity


@dataclass(frozen=True, eq=False, slots=True)
class Enum:
    """One of a list of strings."""

    values: Mapping[str, Note]
    own_name: None = None

    def check(self, value: Json, path: str) -> None:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if value not in self.values:
            name = "null" if path.endswith("]") else path.rpartition(".")[2]
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'")

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        members = [note.marked({"name": name}) for name, note in self.values.items()]
        return {"meta-type": "enum", "members": members, "values": list(self.values)}


@dataclass(frozen=True, eq=False, slots=True)
class Array:
    """Any number of elements of one type."""

    element: Type
    own_name: None = None

    def check(self, value: Json, path: str) -> None:
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        for index, item in enumerate(value):
            self.element.check(item, f"{path}[{index}]")

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        return {"meta-type": "array", "element-type": name_of(self.element)}


@dataclass(frozen=True, eq=False, slots=True)
class Alternate:
    """Any of several types that look different."""

    name: str
    types: Sequence[Type]
    own_name: None = None

    def check(self, value: Json, path: str) -> None:
        for choice in self.types:
            try:
                return choice.check(value, path)
            except CommandError:
                continue
        raise _wrong_type(path, self.name)

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        members = [{"type": name_of(choice)} for choice in self.types]
        return {"meta-type": "alternate", "members": members}


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of an integer; a bound may be the name of another member."""

    low: int | str
    high: int | str
    power_of_two: bool
    error: str

    def check(self, value: Json, others: Mapping[str, Json]) -> None:
        low, high = (_bound(bound, others) for bound in (self.low, self.high))
        fits = isinstance(value, int) and low <= value <= high
        if not fits or (self.power_of_two and not _is_power_of_two(value)):
            raise CommandError(self.error)


def _is_power_of_two(value: Json) -> bool:
    return isinstance(value, int) and value.bit_count() == 1


def _bound(bound: int | str, others: Mapping[str, Json]) -> int:
    value = others[bound] if isinstance(bound, str) else bound
    assert isinstance(value, int)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Member(Note):
    """A member of an object."""

    name: str
    type: Type
    optional: bool
    default: Json = None
    range: Range | None = None

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        entity: dict[str, Json] = {"name": self.name, "type": name_of(self.type)}
        if self.optional:
            entity["default"] = None
        return self.marked(entity)


@dataclass(frozen=True, eq=False, slots=True)
class Object:
    """Named members; with a tag, its value decides which others there are."""

    members: Sequence[Member] = ()
    tag: str | None = None
    variants: Mapping[str, Object] = field(default_factory=dict)
    own_name: None = None

    def check(self, value: Json, path: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "object")
        known = self._visit(value, f"{path}." if path else "")
        for name in value:
            if name not in known:
                raise CommandError(f"Parameter '{path}.{name}' is unexpected")

    def check_arguments(self, arguments: Mapping[str, Json]) -> None:
        """Like `check`, for the object that paths are counted from."""
        known = self._visit(arguments, "")
        for name in arguments:
            if name not in known:
                raise CommandError(f"Parameter '{name}' is unexpected")

    def _visit(self, value: Mapping[str, Json], prefix: str) -> set[str]:
        """Check the declared members, in order; return their names."""
        for member in self.members:
            if member.name in value:
                member.type.check(value[member.name], prefix + member.name)
            elif not member.optional:
                raise CommandError(f"Parameter '{prefix}{member.name}' is missing")
        known = {member.name for member in self.members}
        variant = self.variants.get(str(value[self.tag])) if self.tag else None
        return known | variant._visit(value, prefix) if variant else known

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        entity: dict[str, Json] = {
            "meta-type": "object",
            "members": [member.entity(name_of) for member in self.members],
        }
        if self.tag is not None:
            entity["tag"] = self.tag
            entity["variants"] = [
                {"case": case, "type": name_of(self.variants.get(case, EMPTY))}
                for case in self._cases()
            ]
        return entity

    def _cases(self) -> Iterable[str]:
        tag = next(member.type for member in self.members if member.name == self.tag)
        return tag.values if isinstance(tag, Enum) else ()


EMPTY: Final = Object()

_UNSIGNED: Final = "Parameter '{}' expects uint64"
_SIGNED: Final = "Invalid parameter type for '{}', expected: integer"

BUILTIN: Final[Mapping[str, Type]] = {
    "str": Builtin("str", "string", (str,)),
    "bool": Builtin("bool", "boolean", (bool,)),
    "number": Builtin("number", "number", (int, float)),
    "null": Builtin("null", "null", (type(None),)),
    "any": AnyValue(),
    "int": Integer(-(2**63), 2**63 - 1, _SIGNED, _SIGNED),
    "uint8": Integer(0, 2**8 - 1, _UNSIGNED, "Parameter '{1}' expects uint8_t"),
    "uint16": Integer(0, 2**16 - 1, _UNSIGNED, "Parameter '{1}' expects uint16_t"),
    "uint32": Integer(0, 2**32 - 1, _UNSIGNED, "Parameter '{1}' expects uint32_t"),
    "uint64": Integer(0, 2**64 - 1, _UNSIGNED, _UNSIGNED),
    "size": Integer(0, 2**64 - 1, _UNSIGNED, _UNSIGNED),
}


# --- commands, events, and the whole -----------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Note):
    """A command under one of its names."""

    name: str
    target: str  # the name its handler has; differs for an alias
    arguments: Object
    returns: Type
    allow_oob: bool
    alternative: Object | None

    def check(self, arguments: Mapping[str, Json]) -> None:
        """Raise CommandError unless the arguments are as declared."""
        form = self.arguments
        own = {member.name for member in form.members}
        if self.alternative is not None and arguments and own.isdisjoint(arguments):
            form = self.alternative
        form.check_arguments(arguments)

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        entity: dict[str, Json] = {
            "name": self.name,
            "meta-type": "command",
            "arg-type": name_of(self.arguments),
            "ret-type": name_of(self.returns),
        }
        if self.allow_oob:
            entity["allow-oob"] = True
        return self.marked(entity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Note):
    """An event and the data it carries."""

    name: str
    data: Object

    def check(self, data: Mapping[str, Json] | None) -> None:
        """Raise CommandError unless the data are as declared."""
        self.data.check_arguments(data or {})

    def entity(self, name_of: Callable[[Type], str]) -> Mapping[str, Json]:
        entity: dict[str, Json] = {
            "name": self.name,
            "meta-type": "event",
            "arg-type": name_of(self.data),
        }
        return self.marked(entity)


@dataclass(frozen=True, slots=True)
class Schema:
    """Every command (aliases included), event and named type, by name."""

    commands: Mapping[str, Command]
    events: Mapping[str, Event]
    types: Mapping[str, Type]

    def served_by(self, handlers: Iterable[str]) -> Mapping[str, Command]:
        """The commands for which there is a handler, by every name they have."""
        known = frozenset(handlers)
        unknown = known - {command.target for command in self.commands.values()}
        if unknown:
            raise ValueError(f"handlers without a schema: {sorted(unknown)}")
        return {n: c for n, c in self.commands.items() if c.target in known}

    def object(self, name: str) -> Object:
        """The object type of that name."""
        found = self.types[name]
        if not isinstance(found, Object):
            raise TypeError(f"{name} is not an object type")
        return found

    def enum(self, name: str) -> Sequence[str]:
        """The values of the enum of that name, in order."""
        found = self.types[name]
        if not isinstance(found, Enum):
            raise TypeError(f"{name} is not an enum type")
        return tuple(found.values)

    def defaults(self, name: str) -> dict[str, Json]:
        """The members of an object type that have a default, and their defaults."""
        members = self.object(name).members
        return {m.name: m.default for m in members if m.default is not None}

    def check_ranges(self, name: str, values: Mapping[str, Json]) -> None:
        """Raise CommandError for the first member of `values` out of its range.

        `values` is the whole set that would result, because some bounds are the
        values of other members.
        """
        for member in self.object(name).members:
            if member.range is not None and member.name in values:
                member.range.check(values[member.name], values)

    def introspect(self, commands: Iterable[Command]) -> list[Mapping[str, Json]]:
        """The answer to `query-qmp-schema`, for the given commands."""
        return _Introspection().entities([*commands, *self.events.values()])


class _Introspection:
    """Numbers the types in the order in which they are first referred to."""

    def __init__(self) -> None:
        self._names: dict[Type, str] = {}
        self._todo: list[Type] = []
        self._number = 0
        self._name_of(EMPTY)

    def entities(self, roots: Iterable[Command | Event]) -> list[Mapping[str, Json]]:
        entities = [root.entity(self._name_of) for root in roots]
        defined: set[str] = set()
        for found in self._todo:  # grows while it is being read
            name = self._names[found]
            if name not in defined:
                defined.add(name)
                entities.append({"name": name, **found.entity(self._name_of)})
        return entities

    def _name_of(self, wanted: Type) -> str:
        if wanted not in self._names:
            self._names[wanted] = self._new_name(wanted)
            self._todo.append(wanted)
        return self._names[wanted]

    def _new_name(self, wanted: Type) -> str:
        if isinstance(wanted, Array):
            return f"[{self._name_of(wanted.element)}]"
        if wanted.own_name is not None:
            return wanted.own_name
        self._number += 1
        return str(self._number - 1)


# --- reading the files -------------------------------------------------------


def load(files: Iterable[str] = FILES) -> Schema:
    """The schema that the named files of `qmp_schema` make together."""
    folder = resources.files("qmp_schema")
    return _Reader(
        _dict(message.decode_packet((folder / f).read_bytes())) for f in files
    ).schema()


class _Reader:
    """Turns the JSON of the files into types; later files may use earlier ones."""

    def __init__(self, files: Iterable[Mapping[str, Json]]) -> None:
        self._parts: dict[str, dict[str, Json]] = {}
        for content in files:
            for part, entries in content.items():
                self._parts.setdefault(part, {}).update(_dict(entries))
        self._types: dict[str, Type] = dict(BUILTIN)

    def schema(self) -> Schema:
        commands = {n: self._command(n, n) for n in self._part("commands")}
        for alias, target in self._part("aliases").items():
            commands[alias] = self._command(alias, str(target))
        events = {n: self._event(n, _dict(e)) for n, e in self._part("events").items()}
        types = {name: self._type(name) for name in self._part("types")}
        return Schema(commands, events, types)

    def _part(self, name: str) -> Mapping[str, Json]:
        return self._parts.get(name, {})

    def _command(self, name: str, target: str) -> Command:
        entry = _dict(self._part("commands")[target])
        alternative = entry.get("alternative")
        return Command(
            name=name,
            target=target,
            doc=str(entry["doc"]),
            features=_strings(entry.get("features", [])),
            arguments=self._object_or_name(entry.get("arguments", {})),
            returns=self._type(entry["returns"]) if "returns" in entry else EMPTY,
            allow_oob=entry.get("allow-oob") is True,
            alternative=self._object_or_name(alternative) if alternative else None,
        )

    def _event(self, name: str, entry: Mapping[str, Json]) -> Event:
        data = self._object_or_name(entry.get("data", {}))
        return Event(name=name, doc=str(entry["doc"]), data=data)

    def _object_or_name(self, entry: Json) -> Object:
        if not entry:
            return EMPTY
        if not isinstance(entry, str):
            return Object(self._members(_dict(entry)))
        named = self._type(entry)
        assert isinstance(named, Object), entry
        return named

    def _type(self, entry: Json) -> Type:
        """The type called `entry`; ["T"] stands for the array of T."""
        name = str(entry)
        if name not in self._types:
            if isinstance(entry, list):
                self._types[name] = Array(self._type(entry[0]))
            else:
                self._types[name] = self._define(name)
        return self._types[name]

    def _define(self, name: str) -> Type:
        entry = _dict(self._part("types")[name])
        if "enum" in entry:
            return Enum({n: _note(note) for n, note in _dict(entry["enum"]).items()})
        if "names-of" in entry:
            return self._names_of(entry["names-of"])
        if "alternate" in entry:
            names = _strings(entry["alternate"])
            return Alternate(name, [self._type(choice) for choice in names])
        return self._define_object(entry)

    def _names_of(self, entry: Json) -> Enum:
        members = self._object_or_name(entry).members
        return Enum({m.name: Note(doc=m.doc, features=m.features) for m in members})

    def _define_object(self, entry: Mapping[str, Json]) -> Object:
        variants = _dict(entry.get("variants", {}))
        base = self._object_or_name(entry.get("base", {})).members
        own = self._members(_dict(entry["members"]))
        members = {member.name: member for member in (*base, *own)}
        return Object(
            tuple(members.values()),
            str(entry["tag"]) if "tag" in entry else None,
            {case: self._object_or_name(name) for case, name in variants.items()},
        )

    def _members(self, entries: Mapping[str, Json]) -> Sequence[Member]:
        return tuple(self._member(name, entry) for name, entry in entries.items())

    def _member(self, name: str, entry: Json) -> Member:
        detail = entry if isinstance(entry, Mapping) else {"type": entry}
        return Member(
            name=name.removesuffix("?"),
            optional=name.endswith("?"),
            type=self._type(detail["type"]),
            default=detail.get("default"),
            range=_range(_dict(detail["range"])) if "range" in detail else None,
            doc=str(detail.get("doc", "")),
            features=_strings(detail.get("features", [])),
        )


def _note(entry: Json) -> Note:
    if isinstance(entry, str):
        return Note(doc=entry)
    detail = _dict(entry)
    return Note(doc=str(detail["doc"]), features=_strings(detail["features"]))


def _range(entry: Mapping[str, Json]) -> Range:
    return Range(
        low=_number_or_name(entry.get("from", 0)),
        high=_number_or_name(entry.get("to", 2**64 - 1)),
        power_of_two=entry.get("power-of-two") is True,
        error=str(entry["error"]),
    )


def _number_or_name(entry: Json) -> int | str:
    assert isinstance(entry, int | str), entry
    return entry


def _dict(entry: Json) -> Mapping[str, Json]:
    assert isinstance(entry, Mapping), entry
    return entry


def _strings(entry: Json) -> Sequence[str]:
    assert isinstance(entry, list), entry
    return [str(item) for item in entry]
