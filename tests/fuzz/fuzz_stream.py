"""Feeds broken bytes to every decoder of the stream until time is up.

    python tests/fuzz/fuzz_stream.py --seconds 60 [--seed N]

Starts from the samples of the unit tests, damages them, and passes as long as a
decoder returns a value or raises StreamError. Anything else ends the run with
status 1 and a reproducer: the sample, the bytes, and the traceback. Equal seeds
give equal inputs.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import TYPE_CHECKING

from support import fuzzing
from support.stream_samples import DESCRIPTION, SAMPLES, Sample

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, foreign, section, vmdesc

if TYPE_CHECKING:
    import random

MAX_INPUT = 1 << 16
# Integers at which lengths, counts and offsets change their meaning.
EDGES = [
    edge.to_bytes(size, "big")
    for size in (1, 2, 4, 8)
    for edge in (0, 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, (1 << 8 * size) - 4096)
    if 0 <= edge < 1 << 8 * size
]
SPLICES = [sample.wire[:512] for sample in SAMPLES]
BLOCKS = section.encode_ram_setup(
    [
        section.BlockEntry(idstr="pc.ram", length=4 << 20, page_size=2 << 20),
        section.BlockEntry(idstr="pc.bios", length=1 << 18),
    ]
)
SECTIONS = section.encode_section(
    section.Full(section_id=9, name="device", instance=0, version=1), b"state"
) + section.encode_section(
    section.Full(section_id=3, name=c.GLOBALSTATE_SECTION, instance=0, version=1),
    section.encode_globalstate(section.GlobalState("running")),
)


def foreign_sections(wire: bytes) -> object:
    """All that is asked of sections that nobody here can read."""
    return (
        foreign.run_state_untrusted(wire),
        foreign.ends_with_globalstate_untrusted(wire),
        foreign.ends_with_section_untrusted(wire),
        foreign.end_of_section_untrusted(wire, 2),
    )


def foreign_blocks(wire: bytes) -> object:
    return foreign.read_ram_setup_untrusted(fields.over(wire), advised=True)


TARGETS = [
    *SAMPLES,
    Sample(
        name="blocks of a guest that is not known",
        wire=BLOCKS,
        value=None,
        decode=foreign_blocks,
        encode=lambda _: BLOCKS,
    ),
    Sample(
        name="sections of a guest that is not known",
        wire=SECTIONS,
        value=None,
        decode=foreign_sections,
        encode=lambda _: SECTIONS,
    ),
    Sample(
        name="lengths of a description",
        wire=DESCRIPTION,
        value=None,
        decode=vmdesc.lengths_untrusted,
        encode=lambda _: DESCRIPTION,
    ),
]


def flip(dice: random.Random, wire: bytearray, at: int) -> None:
    wire[at : at + 1] = bytes([dice.randrange(256)])


def edge(dice: random.Random, wire: bytearray, at: int) -> None:
    value = dice.choice(EDGES)
    wire[at : at + len(value)] = value


def cut(dice: random.Random, wire: bytearray, at: int) -> None:
    del wire[at : at + dice.randrange(1, 64)]


def repeat(dice: random.Random, wire: bytearray, at: int) -> None:
    wire[at:at] = wire[at : at + dice.randrange(1, 64)]


def splice(dice: random.Random, wire: bytearray, at: int) -> None:
    wire[at:at] = dice.choice(SPLICES)


def truncate(_dice: random.Random, wire: bytearray, at: int) -> None:
    del wire[at:]


DAMAGES = (flip, flip, flip, edge, edge, cut, repeat, splice, truncate)


def damaged(dice: random.Random, wire: bytes) -> bytes:
    """One to six damages, most of them near the beginning, where headers are."""
    broken = bytearray(wire)
    for _ in range(dice.randrange(1, 7)):
        reach = dice.choice((16, 64, len(broken)))
        at = dice.randrange(min(reach, len(broken)) + 1)
        dice.choice(DAMAGES)(dice, broken, at)
    return bytes(broken[:MAX_INPUT])


def survives(sample: Sample, wire: bytes) -> bool:
    """Decode; False, with a reproducer printed, if that broke the contract."""
    try:
        sample.decode(wire)
    except StreamError as error:
        return bool(str(error))
    except Exception:
        print(f"sample: {sample.name}\ninput:  {wire.hex()}", file=sys.stderr)
        traceback.print_exc()
        return False
    return True


def once(dice: random.Random) -> bool:
    sample = dice.choice(TARGETS)
    return survives(sample, damaged(dice, sample.wire))


if __name__ == "__main__":
    sys.exit(fuzzing.main("fuzz the decoders of the stream", once))
