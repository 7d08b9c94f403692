"""Two answers to `query-qmp-schema`, compared in what they say.

Type names are numbers that mean nothing, so types are compared by what they
are, from the commands and events downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

NOTHING = "-"

Entities = dict[str, dict[str, Any]]


@dataclass(frozen=True, order=True)
class Difference:
    """What the one and the other say of the thing that a path leads to."""

    path: str
    one: str
    other: str


def by_name(schema: Iterable[Mapping[str, Any]]) -> Entities:
    return {entity["name"]: dict(entity) for entity in schema}


def shared(one: Entities, other: Entities) -> list[str]:
    """Commands and events that are in both."""
    return sorted(
        name
        for name in one.keys() & other.keys()
        if one[name]["meta-type"] in ("command", "event")
    )


def differences(one: Entities, other: Entities) -> list[Difference]:
    """Where the commands and events that both have differ."""
    return sorted(_Comparison(one, other).all())


class _Comparison:
    """A pair of types is compared once, under the path that leads there first."""

    def __init__(self, one: Entities, other: Entities) -> None:
        self._one, self._other = one, other
        self._seen: set[tuple[str, str]] = set()

    def all(self) -> Iterator[Difference]:
        for name in shared(self._one, self._other):
            a, b = self._one[name], self._other[name]
            yield from _attributes(name, a, b, "meta-type", "allow-oob", "features")
            for part in ("arg-type", "ret-type"):
                if part in a:
                    yield from self._types(f"{name} {part[:3]}", a[part], b[part])

    def _types(self, path: str, a: str, b: str) -> Iterator[Difference]:
        if (a, b) in self._seen:
            return
        self._seen.add((a, b))
        one, other = self._one[a], self._other[b]
        yield from _attributes(path, one, other, "meta-type", "json-type", "tag")
        if one["meta-type"] != other["meta-type"]:
            return
        match one["meta-type"]:
            case "array":
                element = one["element-type"], other["element-type"]
                yield from self._types(f"{path}[]", *element)
            case "enum":
                yield from self._values(path, one, other)
            case "object":
                yield from self._object(path, one, other)
            case "alternate":
                yield from self._alternate(path, one, other)

    def _values(self, path: str, one: Any, other: Any) -> Iterator[Difference]:
        for name, a, b in _paired(one["members"], other["members"], "name"):
            yield from _attributes(f"{path}={name}", a, b, "features")

    def _object(self, path: str, one: Any, other: Any) -> Iterator[Difference]:
        for name, a, b in _paired(one["members"], other["members"], "name"):
            inner = f"{path}.{name}"
            yield from _attributes(inner, a, b, "features", "default")
            if a and b:
                yield from self._types(inner, a["type"], b["type"])
        for case, a, b in _paired(one.get("variants"), other.get("variants"), "case"):
            inner = f"{path}({case})"
            yield from _attributes(inner, a, b)
            if a and b:
                yield from self._types(inner, a["type"], b["type"])

    def _alternate(self, path: str, one: Any, other: Any) -> Iterator[Difference]:
        kinds = [
            sorted(side[member["type"]]["json-type"] for member in found["members"])
            for side, found in ((self._one, one), (self._other, other))
        ]
        if kinds[0] != kinds[1]:
            yield Difference(path, str(kinds[0]), str(kinds[1]))


def _paired(
    one: list[Any] | None, other: list[Any] | None, key: str
) -> Iterator[tuple[str, Any, Any]]:
    """Members of the same name together; None where there is none."""
    left = {member[key]: member for member in one or ()}
    right = {member[key]: member for member in other or ()}
    for name in left | right:
        yield name, left.get(name), right.get(name)


def _attributes(path: str, one: Any, other: Any, *names: str) -> Iterator[Difference]:
    """Differences of the plain attributes; `default` says that it's optional."""
    if not one or not other:
        there = ("there", NOTHING) if one else (NOTHING, "there")
        yield Difference(path, *there)
        return
    for name in names:
        a, b = (_shown(name, side) for side in (one, other))
        if a != b:
            yield Difference(path, f"{name} {a}", f"{name} {b}")


def _shown(name: str, side: Any) -> str:
    if name == "default":
        return "optional" if "default" in side else "mandatory"
    value = side.get(name)
    return ", ".join(sorted(value)) if isinstance(value, list) else str(value)
