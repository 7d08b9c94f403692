"""The file `description.json`: what is known of a VM besides its stream.

A JSON object in ASCII whose last member is the SHA-256 of all bytes before it.
It is for people and their programs: the manifest does not list it, it may come
and change at any time, and without it a VM is served as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Final

from common.errors import HostError
from common.store import files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME: Final = "description.json"
MAX_SIZE: Final = 32 << 20  # bytes
COMMAND: Final = "command-line"  # the source's, a list of words

_TAIL: Final = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n')
_TAIL_SIZE: Final = 64 + len(',\n "sha256": ""\n}\n')
_WAY_OUT: Final = "describe the VM again, or remove this file: it is only for people"


def load(directory: Path) -> dict[str, Any]:
    """Its members; none if there is no file. HostError if it is damaged."""
    path = directory / NAME
    if not path.exists():
        return {}
    found = _members_untrusted(files.read(path, MAX_SIZE))
    if found is None:
        raise HostError(f"{path} is not what it was; {_WAY_OUT}")
    return found


def update(directory: Path, members: Mapping[str, Any]) -> None:
    """Add these, or replace those of their names; durable when this returns.

    What was there and is damaged is lost.
    """
    try:
        known = load(directory)
    except HostError:
        known = {}
    text = _encode({**known, **members})
    if len(text) > MAX_SIZE:
        raise HostError(f"a description of {len(text)} bytes is too long")
    files.replace(directory / NAME, text)


def command_of(members: Mapping[str, Any]) -> tuple[str, ...]:
    """The source's command line; none if it is not known."""
    words = members.get(COMMAND)
    if not isinstance(words, list) or not all(isinstance(one, str) for one in words):
        return ()
    return tuple(words)


def _encode(members: Mapping[str, Any]) -> bytes:
    body = json.dumps(members, indent=1).encode("ascii").removesuffix(b"\n}")
    return body + f',\n "sha256": "{_digest(body)}"\n}}\n'.encode("ascii")


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _members_untrusted(text: bytes) -> dict[str, Any] | None:
    tail = _TAIL.fullmatch(text, max(len(text) - _TAIL_SIZE, 0))
    if not tail or _digest(text[: tail.start()]) != tail[1].decode("ascii"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    del found["sha256"]
    return found
