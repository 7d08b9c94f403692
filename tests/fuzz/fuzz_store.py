"""Feeds broken bytes to all that reads a parked VM's files, and files to import.

    python tests/fuzz/fuzz_store.py --seconds 60 [--seed N]

Each execution damages one sample and expects a value or the one error that its
reader may raise. A manifest gets a right checksum again half of the time, or
nothing behind the checksum would be reached. What is imported in spite of its
damage has to be a whole VM. Anything else ends the run with status 1 and a
reproducer. Equal seeds give equal inputs.
"""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trio
from support import fuzzing, saved, saved_streams

from common.errors import HostError, StreamError
from common.store import importing, manifest, virsh
from common.store.directory import Parked, Parking
from common.store.manifest import Block, File, Manifest, ManifestError
from common.stream import fields

_BLOCK = Block(name="pc.ram", length=1 << 20, page_size=4096, file="ram-0000")
_MANIFEST = manifest.encode(
    Manifest(
        machine="pc-q35-10.0",
        blocks=(_BLOCK,),
        advised=True,
        run_state="running",
        origin="10.0.0.1 port 4444",
        created="2026-01-02T03:04:05Z",
        devices=("timer", "cpu"),
        files={name: File(64, 7) for name in manifest.FILES},
    )
)
_TAIL = b',\n "sha256"'
_NOTES = (
    b'{"advised": true}\n{"name": "pc.ram", "length": 65536, "page-size": 4096,'
    b' "file": "ram-0000", "offset": 0}\n'
)
_TOKENS = [*b'{}[]",:-e0 \xff\0', 0x80, 0x7E, 0x04]

Check = Callable[[Path, bytes, random.Random], None]


def decode_manifest(_folder: Path, data: bytes, dice: random.Random) -> None:
    body = data.split(_TAIL)[0]
    if dice.randrange(2):
        digest = hashlib.sha256(body).hexdigest().encode()
        data = body + _TAIL + b': "' + digest + b'"\n}\n'
    try:
        found = manifest.decode_untrusted(data)
    except ManifestError:
        return
    assert manifest.decode_untrusted(manifest.encode(found)) == found


def recall(folder: Path, data: bytes, _dice: random.Random) -> None:
    (folder / "receiving").write_bytes(data)
    (folder / "ram-0000").write_bytes(bytes(65536))
    try:
        Parking.reopen(folder).close()
    except HostError:
        return


def virsh_head(_folder: Path, data: bytes, _dice: random.Random) -> None:
    try:
        virsh.read_untrusted(fields.over(data))
    except StreamError:
        return


def bring(folder: Path, data: bytes, dice: random.Random) -> None:
    (folder / "file").write_bytes(data)
    try:
        trio.run(_import, folder, bool(dice.randrange(2)))
    except HostError:
        assert not (folder / "vm").exists()
        return
    with Parked.open(folder / "vm") as parked:
        parked.verify()


async def _import(folder: Path, copy: bool) -> None:
    await importing.import_file(folder / "file", folder / "vm", copy=copy)


TARGETS: list[tuple[Check, bytes]] = [
    (decode_manifest, _MANIFEST),
    (decode_manifest, _MANIFEST),
    (recall, _NOTES),
    (virsh_head, saved.virsh_head()[:400]),
    (bring, saved_streams.PLAIN),
    (bring, saved_streams.mapped_file(stale=True)),
]


def damaged(dice: random.Random, data: bytes) -> bytes:
    """One to four damages, half of them near the beginning, where headers are."""
    broken = bytearray(data)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(min(len(broken), dice.choice((200, 1 << 30))) + 1)
        match dice.randrange(6):
            case 0:
                del broken[at : at + dice.randrange(1, 16)]
            case 1:
                broken[at:at] = broken[at : at + dice.randrange(1, 16)]
            case 2:
                broken[at : at + 1] = bytes([dice.choice(_TOKENS)])
            case 3 if not dice.randrange(8):
                del broken[at:]
            case _:
                broken[at : at + 1] = bytes([dice.randrange(256)])
    return bytes(broken)


def survives(check: Check, data: bytes, dice: random.Random) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-store-", dir="/dev/shm"))
    try:
        check(folder, data, dice)
    except Exception:
        print(f"target: {check.__name__}\ninput:  {data.hex()}", file=sys.stderr)
        traceback.print_exc()
        return False
    finally:
        shutil.rmtree(folder)
    return True


def once(dice: random.Random) -> bool:
    check, sample = dice.choice(TARGETS)
    return survives(check, damaged(dice, sample), dice)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # a boot that was damaged is another one
    sys.exit(fuzzing.main("fuzz the readers of parked VMs", once))
