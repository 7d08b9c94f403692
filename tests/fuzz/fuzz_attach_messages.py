"""Feeds broken packets to the decoder of attach messages until time is up.

    python tests/fuzz/fuzz_attach_messages.py --seconds 60 [--seed N]

Starts from good messages, damages their bytes or the values in them, and passes
as long as the decoder returns a record or raises AttachError with a sentence
that can be sent back. Anything else ends the run with status 1 and a reproducer.
Equal seeds give equal inputs.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import fuzzing
from support.attach_samples import SAMPLES

from common.guest import attach

if TYPE_CHECKING:
    import random

TOKENS = [
    *(b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\\", b"\\ud800", b"\\u0000"),
    *(b"null", b"true", b"-0", b"1e999", b"9" * 4400, b"-9223372036854775809"),
    *(b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"[" * 1100, b'{"":' * 1100),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64),
    *(10**4000, 1.5, "", "\0", "\ud800", "\U0010ffff", "a" * 300, "é" * 200, [], {}),
    *(["userfaultfd"] * 3, [[]], [{}], {"": None}, "block:ram", "keep:", "incoming"),
]


def damage_bytes(dice: random.Random, packet: bytes) -> bytes:
    broken = bytearray(packet)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(len(broken) + 1)
        match dice.randrange(4):
            case 0:
                broken[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                broken[at:at] = dice.choice(TOKENS)
            case 2:
                del broken[at : at + dice.randrange(1, 32)]
            case _:
                del broken[at:]
    return bytes(broken)


def damage_values(dice: random.Random, packet: bytes) -> bytes:
    message = json.loads(packet)
    for _ in range(dice.randrange(1, 4)):
        _replace(dice, message)
    return json.dumps(message).encode()


def _replace(dice: random.Random, place: Any) -> None:
    """Go down to a random member and put something else there, or nothing."""
    while isinstance(place, dict | list) and place:
        key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and dice.random() < 0.8:
            place = inner
            continue
        if dice.random() < 0.2:
            del place[key]
        else:
            place[key] = copy.deepcopy(dice.choice(VALUES))
        return


def survives(packet: bytes, descriptors: int) -> bool:
    """Decode; False, with a reproducer printed, if that broke the contract."""
    try:
        attach.decode_untrusted(packet, descriptors)
    except attach.AttachError as error:
        attach.refused(str(error))
        return bool(str(error))
    except Exception:
        print(f"input: {packet!r}, {descriptors} descriptors", file=sys.stderr)
        traceback.print_exc()
        return False
    return True


def once(dice: random.Random) -> bool:
    sample = dice.choice(SAMPLES)
    damage = dice.choice((damage_bytes, damage_values))
    count = sample.descriptors if dice.random() < 0.9 else dice.randrange(130)
    return survives(damage(dice, sample.packet), count)


if __name__ == "__main__":
    sys.exit(fuzzing.main("fuzz the decoder of attach messages", once))
