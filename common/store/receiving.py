"""The file `receiving`: what has come of a VM so far, a JSON object a line.

It is there until the directory is complete, so that another process can go on
where one has ended. A line that a crash cut off says nothing. Pages that came
are not on the disk before the VM is complete, so what came is of use only until
the host goes down: that is why it says in which boot of the host it came.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.errors import HostError
from common.store import files, manifest
from common.store.manifest import Block

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NAME: Final = "receiving"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Advised:
    """The stream had an ADVISE, or had not."""

    advised: bool


@dataclass(frozen=True, slots=True)
class Boot:
    """From here on pages came in this boot of the host; the kernel's word for it."""

    boot: str


Fact = Block | Advised | Boot


def begin(directory: Path) -> None:
    files.write(directory / NAME, b"")
    note(directory, this_boot())


def this_boot() -> Boot:
    with files.named(_BOOT_ID, "read"):
        return Boot(_BOOT_ID.read_text().strip())


def is_of_this_boot(facts: Iterable[Fact]) -> bool:
    """Whether all pages that are said to be here are."""
    boots = [fact for fact in facts if isinstance(fact, Boot)]
    return boots[-1:] == [this_boot()]


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
    if isinstance(fact, Boot):
        return {"boot": fact.boot}
    return manifest.members_of(fact)


def _fact(members: object) -> Fact:
    if isinstance(members, dict) and "advised" in members:
        return Advised(members["advised"] is True)
    if isinstance(members, dict) and "boot" in members:
        return Boot(str(members["boot"]))
    return manifest.block_untrusted(members)
