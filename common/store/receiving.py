"""The file `receiving`: what has come of a VM so far, a JSON object a line.

It is there until the directory is complete, so that another process can go on
where one has ended. A line that a crash cut off says nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import HostError
from common.store import files, manifest
from common.store.manifest import Block

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME: Final = "receiving"


@dataclass(frozen=True, slots=True)
class Advised:
    """The stream had an ADVISE, or had not."""

    advised: bool


Fact = Block | Advised


def begin(directory: Path) -> None:
    files.write(directory / NAME, b"")


def is_here(directory: Path) -> bool:
    return (directory / NAME).exists()


def note(directory: Path, fact: Fact) -> None:
    path = directory / NAME
    with files.named(path, "write"), open(path, "ab") as file:
        file.write(json.dumps(_members(fact)).encode("ascii") + b"\n")


def recall(directory: Path) -> Iterator[Fact]:
    """What was noted, in that order; HostError if it is no such file."""
    path = directory / NAME
    for line in files.read(path, manifest.MAX_SIZE).split(b"\n")[:-1]:
        try:
            yield _fact(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HostError(
                f"{path} is damaged ({error}); remove {directory}"
            ) from None


def _members(fact: Fact) -> dict[str, object]:
    if isinstance(fact, Advised):
        return {"advised": fact.advised}
    return manifest.members_of(fact)


def _fact(members: object) -> Fact:
    if isinstance(members, dict) and "advised" in members:
        return Advised(members["advised"] is True)
    return manifest.block_untrusted(members)
