"""What the verbs of errand.py do with parked VMs."""

from __future__ import annotations

import json
import resource
import sys
from functools import partial
from typing import TYPE_CHECKING

import trio

from common.errors import HostError
from common.store import importing, inspecting
from common.store.directory import Parked
from common.store.manifest import IMAGE
from srcd import describing

if TYPE_CHECKING:
    from pathlib import Path

    from srcd.errand import Errand


def run_errand(asked: Errand) -> int:
    """Print the answer; returns the exit status, 1 if it is bad."""
    _allow_descriptors()
    try:
        match asked.verb:
            case "inspect":
                _inspect(asked)
            case "verify":
                _verify(asked.directory)
            case "import":
                _import(asked)
            case "describe":
                describing.describe(asked)
    except HostError as error:
        print(f"srcd: {error}", file=sys.stderr)
        return 1
    return 0


def _allow_descriptors() -> None:
    """As many as the host lets us have: a VM may have hundreds of RAM blocks."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _inspect(asked: Errand) -> None:
    with Parked.open(asked.directory) as parked:
        known = inspecting.facts(parked)
    if asked.json:
        print(json.dumps(known, indent=1))
    else:
        print(*inspecting.describe(known), sep="\n")


def _verify(directory: Path) -> None:
    with Parked.open(directory) as parked:
        parked.verify()
        size = sum(block.length for block in parked.manifest.blocks)
    print(f"{directory}: OK, {size >> 20} MiB of RAM and all device state")


def _import(asked: Errand) -> None:
    assert asked.file is not None
    bring = partial(importing.import_file, asked.file, asked.directory, copy=asked.copy)
    done = trio.run(bring)
    kind = "mapped-ram" if done.mapped else "a stream"
    wrapped = " behind a virsh save image's XML" if done.libvirt else ""
    how = "copied"
    if done.in_place:
        how = f"used in place: {asked.directory}/{IMAGE} is the same file"
    print(f"{asked.file}: {kind}{wrapped}, its RAM {how}")
    if done.punched:
        print(f"{done.punched} pages that became zero are holes in it now")
