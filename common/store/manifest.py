"""The manifest: what a directory must hold to be a parked VM.

A JSON object in ASCII whose last member is a checksum of all bytes before it:

    {
     "format": "postcopyd parked VM", "version": 1,
     "machine": …, "advised": …, "run-state": …, "origin": …, "created": …,
     "devices": [name, …],
     "blocks": [{"name", "length", "page-size", "file", "offset"}, …],
     "files": {name: {"size", "crc32c"}, …},
     "sha256": …
    }

Nothing here reads or writes files. Names of files are fixed, so that none can
lead out of the directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from common.stream import constants as c

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME: Final = "manifest.json"
VERSION: Final = 1
MAX_SIZE: Final = 8 << 20  # bytes; MAX_BLOCKS blocks with the longest names fit
MAX_TEXT: Final = 1024  # characters of what people and peers say
MAX_DEVICES: Final = 1 << 16
MAX_STATE: Final = c.MAX_DEVICE_STATE  # bytes of a file that holds no RAM

# A checksum is taken of so many bytes, and is so long itself; csrc/checksum.h.
REGION: Final = 1 << 16
CHECKSUM_SIZE: Final = 4

# Files besides the RAM blocks' that a manifest may list.
CONFIGURATION: Final = "configuration"
EARLY_STATE: Final = "early-state"
DEVICE_STATE: Final = "device-state"
VMDESC: Final = "vmdesc"
CHECKSUMS: Final = "checksums"
NEEDED: Final = (CONFIGURATION, EARLY_STATE, DEVICE_STATE, CHECKSUMS)
FILES: Final = (*NEEDED, VMDESC)
# A file of QEMU's in which the blocks lie at offsets of their own.
IMAGE: Final = "image"

_FORMAT: Final = "postcopyd parked VM"
_BLOCK_FILE: Final = re.compile(rf"ram-[0-9]{{4}}|{IMAGE}", re.ASCII)
_CRC32C: Final = re.compile(r"[0-9a-f]{8}", re.ASCII)
_TAIL: Final = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n')
_TAIL_SIZE: Final = 64 + len(',\n "sha256": ""\n}\n')
_MAX_OFFSET: Final = 1 << 62


class ManifestError(ValueError):
    """Bytes that are no manifest of ours; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A RAM block and where it is: `length` bytes of `file`, from `offset` on.

    `page_size` is the source's, in bytes.
    """

    name: str
    length: int
    page_size: int
    file: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class File:
    """A file whose bytes are known: how many, and their CRC32C."""

    size: int
    crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A parked VM, all but its bytes.

    `blocks` are in the order of the stream. `advised`: the stream had an ADVISE,
    which is why its block list may have page sizes. `devices` are the sections
    of device state, none if there was no description. `run_state` is QEMU's
    word; `origin` and `created` (UTC, ISO 8601) are for people.
    """

    machine: str
    blocks: tuple[Block, ...]
    advised: bool
    run_state: str
    origin: str
    created: str
    files: Mapping[str, File]
    devices: tuple[str, ...] = ()
    version: int = VERSION


def now() -> str:
    """For `created` and the like: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def block_file(number: int) -> str:
    """Where a block's RAM is kept; never made from its name."""
    return f"ram-{number:04d}"


def encode(manifest: Manifest) -> bytes:
    document = {
        "format": _FORMAT,
        "version": manifest.version,
        "machine": manifest.machine,
        "advised": manifest.advised,
        "run-state": manifest.run_state,
        "origin": manifest.origin,
        "created": manifest.created,
        "devices": list(manifest.devices),
        "blocks": [members_of(block) for block in manifest.blocks],
        "files": {
            name: {"size": file.size, "crc32c": f"{file.crc32c:08x}"}
            for name, file in manifest.files.items()
        },
    }
    body = json.dumps(document, indent=1).encode("ascii").removesuffix(b"\n}")
    return body + f',\n "sha256": "{_digest(body)}"\n}}\n'.encode("ascii")


def decode_untrusted(text: bytes) -> Manifest:
    """The manifest that `text` is; raises ManifestError and nothing else."""
    if len(text) > MAX_SIZE:
        raise ManifestError(f"{len(text)} bytes are no manifest")
    tail = _TAIL.fullmatch(text, max(len(text) - _TAIL_SIZE, 0))
    if not tail:
        raise ManifestError("it does not end with its checksum: it is cut off")
    body = text[: tail.start()]
    if _digest(body) != tail[1].decode("ascii"):
        raise ManifestError("it does not match its checksum: it was changed")
    try:
        document = json.loads(text.decode("ascii"), object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError("it is not JSON") from None
    return _manifest(document)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# --- reading -------------------------------------------------------------------------


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ManifestError("a member is there twice")
    return found


def _manifest(document: object) -> Manifest:
    members = _object(document, "the manifest")
    if members.get("format") != _FORMAT:
        raise ManifestError("it is not that of a parked VM")
    if members.get("version") != VERSION:
        raise ManifestError(
            f"its version is {members.get('version')!r:.20} and not {VERSION}: it was"
            " made by another release of postcopyd"
        )
    _exactly(members, _MEMBERS, "the manifest")
    blocks = _blocks(_list(members, "blocks", c.MAX_BLOCKS))
    return Manifest(
        machine=_text(members, "machine", c.MAX_MACHINE_NAME),
        advised=_flag(members, "advised"),
        run_state=_text(members, "run-state"),
        origin=_text(members, "origin"),
        created=_text(members, "created"),
        devices=tuple(
            _text({"device": one}, "device")
            for one in _list(members, "devices", MAX_DEVICES)
        ),
        blocks=blocks,
        files=_files(_object(members["files"], "files"), blocks),
    )


_MEMBERS: Final = {
    *("format", "version", "machine", "advised", "run-state", "origin", "created"),
    *("devices", "blocks", "files", "sha256"),
}
_BLOCK_MEMBERS: Final = {"name", "length", "page-size", "file", "offset"}
_FILE_MEMBERS: Final = {"size", "crc32c"}


def _blocks(found: list[Any]) -> tuple[Block, ...]:
    blocks = tuple(map(block_untrusted, found))
    if len({block.name for block in blocks}) != len(blocks):
        raise ManifestError("a RAM block is there twice")
    if sum(block.length for block in blocks) > c.MAX_RAM_BYTES:
        raise ManifestError("its RAM blocks are larger than any machine's")
    return blocks


def members_of(block: Block) -> dict[str, object]:
    """A block as a JSON object."""
    return {
        "name": block.name,
        "length": block.length,
        "page-size": block.page_size,
        "file": block.file,
        "offset": block.offset,
    }


def block_untrusted(found: object) -> Block:
    """The block that a JSON object describes; ManifestError."""
    members = _object(found, "a RAM block")
    _exactly(members, _BLOCK_MEMBERS, "a RAM block")
    block = Block(
        name=_text(members, "name", c.MAX_NAME),
        length=_number(members, "length", c.MAX_RAM_BYTES),
        page_size=_number(members, "page-size", c.MAX_RAM_BYTES),
        file=_text(members, "file"),
        offset=_number(members, "offset", _MAX_OFFSET),
    )
    _check_block(block)
    return block


def _check_block(block: Block) -> None:
    if not 0 < len(block.name.encode(errors="replace")) <= c.MAX_NAME:
        raise ManifestError("the name of a RAM block is not 1 to 255 bytes long")
    if not block.name.isprintable():
        raise ManifestError(f"the name of a RAM block is not text: {block.name!a}")
    if not _BLOCK_FILE.fullmatch(block.file):
        raise ManifestError(f"{block.file!a:.40} is no name of a RAM file")
    page = block.page_size
    if page < c.TARGET_PAGE_SIZE or page & (page - 1):
        raise ManifestError(f"RAM block {block.name}: no page has {page} bytes")
    if block.length == 0 or block.length % page or block.offset % c.TARGET_PAGE_SIZE:
        raise ManifestError(f"RAM block {block.name} is not made of whole pages")


def checksums_size(length: int) -> int:
    """Bytes that the checksums of a block of `length` bytes take."""
    return -(-length // REGION) * CHECKSUM_SIZE


def _files(members: dict[str, Any], blocks: tuple[Block, ...]) -> dict[str, File]:
    for name in members:
        if name not in FILES:
            raise ManifestError(f"it lists a file that does not belong: {name!a:.40}")
    for name in NEEDED:
        if name not in members:
            raise ManifestError(f"it does not list {name}")
    found = {name: _file(members[name], name) for name in members}
    needed = sum(checksums_size(block.length) for block in blocks)
    if found[CHECKSUMS].size != needed:
        raise ManifestError(
            f"{CHECKSUMS} cannot have {found[CHECKSUMS].size} bytes: the RAM blocks"
            f" need {needed}"
        )
    return found


def _file(found: object, name: str) -> File:
    members = _object(found, name)
    _exactly(members, _FILE_MEMBERS, name)
    digits = _text(members, "crc32c")
    if not _CRC32C.fullmatch(digits):
        raise ManifestError(f"{digits!a:.20} is no CRC32C")
    limit = c.MAX_RAM_BYTES if name == CHECKSUMS else MAX_STATE
    return File(_number(members, "size", limit), int(digits, 16))


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{what} is not an object")
    return value


def _exactly(members: dict[str, Any], names: set[str], what: str) -> None:
    for name in sorted(names ^ members.keys()):
        how = "is missing" if name in names else "does not belong there"
        raise ManifestError(f"{what}: {name!a:.40} {how}")


def _list(members: dict[str, Any], name: str, limit: int) -> list[Any]:
    value = members[name]
    if not isinstance(value, list) or len(value) > limit:
        raise ManifestError(f"{name} is not a list of up to {limit}")
    return value


def _text(members: dict[str, Any], name: str, limit: int = MAX_TEXT) -> str:
    value = members[name]
    if not isinstance(value, str) or len(value) > limit:
        raise ManifestError(f"{name} is not a text of up to {limit} characters")
    return value


def _flag(members: dict[str, Any], name: str) -> bool:
    value = members[name]
    if not isinstance(value, bool):
        raise ManifestError(f"{name} is neither true nor false")
    return value


def _number(members: dict[str, Any], name: str, limit: int) -> int:
    value = members[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ManifestError(f"{name} is not a number")
    if not 0 <= value <= limit:
        raise ManifestError(f"{name} is not within 0 to {limit}")
    return value
