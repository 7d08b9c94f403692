"""Fuzz the lexer and the session: bytes from a client, mutated without end.

    python tests/fuzz/fuzz_qmp_lexer.py --seconds 60 [--seed N]

Each execution changes one of the corpus streams and checks that

* the lexer gives events and raises nothing, whole or cut in two;
* both ways give the same events;
* every text is JSON that the codec decodes and encodes to one ASCII line;
* a session answers every message with exactly one line, and stays usable.

Prints the number of executions and the seed; on a failure prints the input as
a Python literal and exits with status 1.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import TYPE_CHECKING

from support import fuzzing

from common.qmp import message, schema
from common.qmp.lexer import Lexer, Text
from common.qmp.session import Call, Session

if TYPE_CHECKING:
    import random

CORPUS = [
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}',
    b'{"execute":"qmp_capabilities"}{"execute":"query-migrate","id":[1.5,-0,{}]}\r\n',
    b'{"exec-oob":"migrate-pause","id":"\\ud83d\\ude00\\u0000"} {"id": null}',
    b"{'execute':'migrate-set-parameters','arguments':{'max-bandwidth':1e3}}",
    b'{"execute":"migrate","arguments":{"channels":[{"channel-type":"main",'
    b'"addr":{"transport":"socket","type":"inet","host":"\xc3\xa9","port":"1"}}]}}',
    b'[[[{"a":[1}]]]]}%abc "x" \xff\x01{"a":1,"a":2}',
    b'"\\\'\\"\\\\\\/\\b\\f\\n\\r\\t" null true false nil 18446744073709551616 -1.5E-9',
]
TOKENS = [
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"\\u", b"\\ud800",
    b"\xff", b"\xfe", b"\x00", b"\x01", b"\n", b"\xc3", b"\xf0\x9f\x98\x80", b"-",
    b"0", b"1e999", b"9" * 400, b".", b"null", b'"id":', b'"execute":', b'"exec-oob":',
    b'{"execute":"qmp_capabilities"}', b"[" * 1025, b"{'a':" * 600,
]  # fmt: skip

HANDLERS = ["qmp_capabilities", "migrate", "migrate-pause", "query-migrate",
            "migrate-set-parameters", "migrate_set_parameter"]  # fmt: skip
COMMANDS = schema.load().served_by(HANDLERS)


def mutate(rng: random.Random) -> bytes:
    """A corpus stream with a few changes, or two of them joined."""
    data = bytearray(rng.choice(CORPUS))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                data[place:place] = rng.choice(TOKENS)
            case 2:
                del data[place : place + rng.randint(1, 8)]
            case 3:
                data[place:place] = data[place : place + rng.randint(1, 40)]
            case 4:
                data += rng.choice(CORPUS)
    return bytes(data)


def check(data: bytes, cut: int) -> None:
    """Raise AssertionError, or anything, if a promise is broken."""
    events = Lexer().feed(data)
    halves = Lexer()
    assert halves.feed(data[:cut]) + halves.feed(data[cut:]) == events
    for event in events:
        if isinstance(event, Text):
            check_line(message.encode(message.decode(event)))
    check_session(data, len(events))


def check_line(line: bytes) -> None:
    assert line.endswith(b"\r\n"), line
    assert all(0x20 <= byte < 0x7F for byte in line[:-2]), line


def check_session(data: bytes, messages: int) -> None:
    talk = Session(COMMANDS)
    talk.feed(data)
    answers = 0
    while talk.pending:
        for step in talk.out_of_band():
            answers += answer(step)
        step = talk.in_band()
        if step is not None:
            answers += answer(step)
            talk.finish()
    assert answers == messages, (answers, messages)
    assert talk.wants_data


def answer(step) -> int:
    check_line(step.success({}) if isinstance(step, Call) else step.line)
    return 1


def once(rng: random.Random) -> bool:
    data = mutate(rng)
    cut = rng.randrange(len(data) + 1)
    try:
        check(data, cut)
    except Exception:
        traceback.print_exc()
        print(f"reproducer: check({data!r}, {cut})")
        return False
    return True


if __name__ == "__main__":
    sys.exit(fuzzing.main("fuzz the lexer and the session", once))
