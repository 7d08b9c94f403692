"""The description behind the end of a stream: JSON that tells lengths.

After EOF comes the type byte QEMU_VM_VMDESCRIPTION, a be32 length and a JSON
text that lists every FULL section of the stream in order. To this module's
callers the text is bytes. It is the only thing that says where the sections of
unknown devices end, and it comes after them: `split_ending_untrusted` finds it
at the end of what was buffered and then walks the sections, checking that each
length lands on a footer.

    device  {"name", "instance_id", "vmsd_name", "version", "fields", "subsections"}
    field   {"name", "type", "size", "array_len"?}   size is that of one element

QEMU's analyze-migration.py looks for the text behind the last zero byte of the
file and for the first "{" after that. Hence ours has no zero byte, and its
length no byte 0x7b.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, section

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from common.stream.fields import Read

_BRACE: Final = ord("{")
_ENDING: Final = bytes([c.QEMU_VM_EOF, c.QEMU_VM_VMDESCRIPTION])


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a section's body; `size` in bytes, `kind` in QEMU's words."""

    name: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A section as the description has it."""

    name: str
    instance: int
    version: int
    fields: tuple[Field, ...]


GLOBALSTATE: Final = Device(
    name=c.GLOBALSTATE_SECTION,
    instance=0,
    version=c.GLOBALSTATE_SECTION_VERSION,
    fields=(
        Field("size", "uint32", 4),
        Field("runstate", "buffer", 32),
        Field("has_vm_was_suspended", "uint8", 1),
        Field("vm_was_suspended", "uint8", 1),
        Field("unused", "buffer", 66),
    ),
)


def device_state(name: str, version: int, length: int) -> Device:
    """The section of one of our guests: see `section.encode_device_state`."""
    return Device(
        name=name,
        instance=0,
        version=version,
        fields=(Field("length", "uint32", 4), Field("state", "buffer", length)),
    )


def describe(devices: Sequence[Device]) -> bytes:
    """The JSON text for these sections, in the order of the stream."""
    document = {
        "page_size": c.TARGET_PAGE_SIZE,
        "devices": [_describe(device) for device in devices],
    }
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    while _BRACE in fields.be32(len(text)):
        text += b" "
    return text


def _describe(device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "instance_id": device.instance,
        "vmsd_name": device.name,
        "version": device.version,
        "fields": [
            {"name": field.name, "type": field.kind, "size": field.size}
            for field in device.fields
        ],
    }


def encode(text: bytes) -> bytes:
    """Frame a description; an empty one is the shortest that QEMU accepts."""
    if len(text) > c.MAX_VMDESC:
        raise ValueError(f"a description of {len(text)} bytes is too large")
    return bytes([c.QEMU_VM_VMDESCRIPTION]) + fields.be32(len(text)) + text


def read_untrusted(read: Read) -> bytes:
    """Decode the frame behind the type byte; the text is not looked at."""
    length = fields.be32_untrusted(read)
    fields.bounded("description", length, c.MAX_VMDESC)
    return fields.take_untrusted(read, length)


# --- Lengths -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Described:
    """A section that the description lists, and the length of its body."""

    name: str
    instance: int
    length: int


def lengths_untrusted(text: bytes) -> tuple[Described, ...]:
    """What a description says about the bodies of the FULL sections."""
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise StreamError("the description is not JSON", got=text[:16]) from None
    devices = _list(_object(document), "devices")
    return tuple(_described(_object(device)) for device in devices)


def _described(device: dict[str, object]) -> Described:
    name = device.get("name")
    if not isinstance(name, str):
        raise StreamError("a section in the description has no name", got=name)
    return Described(name, _size(device, "instance_id"), _length(device))


def _length(device: dict[str, object]) -> int:
    """The bytes of its fields and subsections, which nest to any depth.

    A subsection adds 6 to its own length and name: type byte, length byte of
    the name, be32 version.
    """
    total = 0
    pending = [device]
    while pending:
        part = pending.pop()
        total += sum(_field_size(_object(field)) for field in _list(part, "fields"))
        for subsection in map(_object, _list(part, "subsections")):
            total += 6 + len(
                str(subsection.get("vmsd_name", "")).encode(errors="replace")
            )
            pending.append(subsection)
    return total


def _field_size(field: dict[str, object]) -> int:
    count = _size(field, "array_len") if "array_len" in field else 1
    return _size(field, "size") * count


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise StreamError("the description is not made of objects", got=type(value))
    return value


def _list(owner: dict[str, object], key: str) -> list[object]:
    value = owner.get(key, [])
    if not isinstance(value, list):
        raise StreamError(f"{key} in the description is not a list", got=type(value))
    return value


def _size(owner: dict[str, object], key: str) -> int:
    value = owner.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise StreamError(f"{key} in the description is not a size", got=value)
    return value


# --- Walking sections by their lengths ---------------------------------------


@dataclass(frozen=True, slots=True)
class Section:
    """A FULL section whose body is opaque."""

    header: section.Full
    body: bytes


def walk_untrusted(area: bytes, described: Sequence[Described]) -> tuple[Section, ...]:
    """Cut `area` into the FULL sections that the description lists, in order.

    Raises StreamError unless names, instances and footers agree and nothing is
    left over.
    """
    read = fields.over(area)
    with read.located():
        sections = tuple(_walk(read, described, len(area)))
        fields.expect("end of the described sections", len(area), read.offset)
    return sections


def _walk(
    read: fields.Reader, described: Sequence[Described], size: int
) -> Iterator[Section]:
    for known in described:
        header = section.read_header_untrusted(read, fields.u8_untrusted(read))
        if not isinstance(header, section.Full):
            raise StreamError("a described section is not a whole one", got=header)
        fields.expect("section name", known.name, header.name)
        fields.expect("section instance", known.instance, header.instance)
        fields.bounded("described section", known.length, size - read.offset)
        body = fields.take_untrusted(read, known.length)
        section.read_footer_untrusted(read, header.section_id)
        yield Section(header, body)


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a precopy stream: its FULL sections and its description.

    `area` are these sections as they came, without those that came early.
    """

    sections: tuple[Section, ...]
    text: bytes | None
    area: bytes = b""


def split_ending_untrusted(tail: bytes, early: bytes = b"") -> Ending | None:
    """Take apart what a precopy source sent behind RAM's END section.

    `early` are the FULL sections that it sent in front of RAM's first part: the
    description lists them first.

    `tail` are whole FULL sections, EOF and the description, with nothing
    behind; a source then waits for SHUT. None means that this is not there
    (yet), which is all one can know of a source that sends no text. Device
    state may contain bytes that look like the frame of a description, so a
    candidate counts only if it lies exactly at the end, is JSON, and its
    lengths land on every footer.
    """
    at = tail.find(_ENDING)
    while at >= 0:
        ending = _ending(tail, at, early)
        if ending is not None:
            return ending
        at = tail.find(_ENDING, at + 1)
    return None


def _ending(tail: bytes, at: int, early: bytes) -> Ending | None:
    """The ending if EOF is at `at`.

    No zero byte is in a description. Looking for one first keeps a tail that
    is full of candidates from costing the square of its length.
    """
    begin = at + len(_ENDING) + 4
    if tail[at + len(_ENDING) : begin] != fields.be32(max(len(tail) - begin, 0)):
        return None
    if tail.find(b"\0", begin) >= 0:
        return None
    text = tail[begin:]
    try:
        sections = walk_untrusted(early + tail[:at], lengths_untrusted(text))
        return Ending(sections, text, tail[:at])
    except StreamError:
        return None
