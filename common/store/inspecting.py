"""What a parked VM is, for people and for programs; reads all but the RAM."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

from common.errors import HostError
from common.store import description
from common.store.destination import destination
from common.store.manifest import IMAGE, REGION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.store.directory import Parked
    from common.store.manifest import Block


def facts(parked: Parked) -> dict[str, Any]:
    """As a JSON object; sizes in bytes, `data` are those that are no holes."""
    found = parked.manifest
    known, fault = _known(parked)
    blocks = [
        {
            "name": block.name,
            "size": block.length,
            "data": data_bytes(fd, block),
            "page-size": block.page_size,
            "file": block.file,
            "offset": block.offset,
        }
        for block, fd in zip(found.blocks, parked.blocks(), strict=True)
    ]
    return {
        "path": str(parked.path),
        "machine": found.machine,
        "run-state": found.run_state,
        "running": parked.running,
        "origin": found.origin,
        "created": found.created,
        "advised": found.advised,
        "size": sum(block.length for block in found.blocks),
        "data": sum(block["data"] for block in blocks),
        "blocks": blocks,
        "device-state": len(parked.early) + len(parked.device_state),
        "devices": list(found.devices),
        "checksums": sum(-(-block.length // REGION) for block in found.blocks),
        "working-set": len(parked.working_set),
        "description": known,
        "description-fault": fault,
        "destination": _destination(parked, known),
    }


def _known(parked: Parked) -> tuple[dict[str, Any], str | None]:
    """The description, or why there is none."""
    try:
        return dict(parked.description), None
    except HostError as error:
        return {}, str(error)


def _destination(parked: Parked, known: dict[str, Any]) -> dict[str, Any] | None:
    """What to start there, if the source's command line is known."""
    words = description.command_of(known)
    if not words:
        return None
    found = parked.manifest
    made = destination(words, found.machine, running=found.run_state == "running")
    return {
        "words": made.words,
        "lines": made.lines,
        "changes": list(made.changes),
        "look-at": list(made.look_at),
    }


def data_bytes(fd: int, block: Block) -> int:
    """Of the block, what is no hole; all of it where the file system cannot tell."""
    total, at, end = 0, block.offset, block.offset + block.length
    while at < end:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), end)
            at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError:
            break  # ENXIO: a hole up to the end of the file
        total += at - data
    return total


def describe(known: dict[str, Any]) -> Iterator[str]:
    """The same in lines."""
    yield f"machine      {known['machine']}"
    yield f"VM           {_state(known)}"
    yield f"origin       {known['origin'] or 'not known'}, {known['created']}"
    yield f"RAM          {_size(known['size'])}, of which {_size(known['data'])} data"
    width = max((len(block["name"]) for block in known["blocks"]), default=0)
    for block in known["blocks"]:
        yield f"  {block['name']:{width}}  {_block(block)}"
    yield from _devices(known)
    yield (
        f"checksums    of {known['checksums']} regions; srcd verify compares them with"
        " the RAM"
    )
    yield f"working set  {_working_set(known['working-set'])}"
    if known["description-fault"]:
        yield f"described    no: {known['description-fault']}"
    yield from _description(known["description"])
    yield from _start(known)


def _state(known: dict[str, Any]) -> str:
    if known["running"]:
        return f"RUNS ELSEWHERE {known['running']}; serve copies of it with --clone"
    if known["run-state"] == "running":
        return "was running, and will be"
    return f"was {known['run-state']}: start QEMU with -S to keep it so"


def _block(block: dict[str, Any]) -> str:
    pages = (
        f", pages of {_size(block['page-size'])}" if block["page-size"] > 4096 else ""
    )
    place = f", at {block['offset']:#x} of {IMAGE}" if block["file"] == IMAGE else ""
    return f"{_size(block['size'])}, {_size(block['data'])} data{pages}{place}"


def _devices(known: dict[str, Any]) -> Iterator[str]:
    size = _size(known["device-state"])
    if not known["devices"]:
        yield f"devices      {size} of state; which they are is not known"
        return
    yield f"devices      {size} of state of {len(known['devices'])}:"
    names = [
        f"{name} x{count}" if count > 1 else name
        for name, count in Counter(known["devices"]).items()
    ]
    indent = " " * 13
    yield from textwrap.wrap(
        ", ".join(names),
        width=80,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _working_set(pages: int) -> str:
    return f"{pages} pages, sent first" if pages else "none yet"


def _description(known: dict[str, Any]) -> Iterator[str]:
    """What has many lines is for --json; the source's command line is, too."""
    for name, value in known.items():
        if name == description.COMMAND and description.command_of(known):
            continue
        if name == "qemu" and isinstance(value, dict):
            yield from _qemu(value)
            continue
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines = text.strip().splitlines()
        if len(lines) > 1:
            yield f"{name}: {len(lines)} lines, see --json"
        else:
            yield f"{name}: {_printable(''.join(lines))}"


def _qemu(found: dict[str, Any]) -> Iterator[str]:
    """What QEMU has said, a line for each thing and each in a list."""
    for name, value in found.items():
        for one in value if isinstance(value, list) else [value]:
            yield f"  {name:10} {_printable(one)}"


def _start(known: dict[str, Any]) -> Iterator[str]:
    start = known["destination"]
    if start is None:
        yield "destination  its command line is not known; see srcd describe --help"
        return
    yield "destination  start it like this, then migrate-incoming:"
    yield ""
    indent = "    "
    yield indent + f"\n{indent}    ".join(start["lines"])
    yield ""
    for sentence in start["changes"]:
        yield f"  {_printable(sentence)}"
    for sentence in start["look-at"]:
        yield f"  LOOK AT {_printable(sentence)}"


def _printable(text: object) -> str:
    shown = str(text)
    return shown if shown.isprintable() else ascii(shown)


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            exact = count % unit == 0
            return f"{count // unit if exact else f'{count / unit:.1f}'} {name}"
    return f"{count} bytes"
