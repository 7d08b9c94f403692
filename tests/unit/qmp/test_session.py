"""The order of checks and of requests, without a socket."""

from __future__ import annotations

import json

import pytest

from common.qmp import schema, session
from common.qmp.lexer import MAX_NESTING
from common.qmp.session import QUEUE_LIMIT, Call, CommandError, Session

HANDLERS = ["qmp_capabilities", "query-name", "migrate", "migrate-pause", "quit"]
COMMANDS = schema.load().served_by(HANDLERS)

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
NEGOTIATE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


def answer(step):
    """What the client would see, every handler returning its command's name."""
    if isinstance(step, Call):
        return json.loads(step.success(step.command.name))
    return json.loads(step.line)


def drain(talk: Session):
    """Answer everything, as the server does, and return the answers in order."""
    answers = []
    while True:
        answers += [answer(step) for step in talk.out_of_band()]
        step = talk.in_band()
        if step is None:
            return answers
        answers.append(answer(step))
        talk.finish()


def next_step(talk: Session):
    """The next in-band step, none being out-of-band."""
    assert list(talk.out_of_band()) == []
    return talk.in_band()


def ask(*texts: bytes, oob: bool = False):
    """The answers to requests on a fresh, negotiated connection."""
    talk = Session(COMMANDS)
    talk.feed(NEGOTIATE_OOB if oob else NEGOTIATE)
    assert drain(talk) == [{"return": {}}]
    talk.feed(b"".join(texts))
    return drain(talk)


def error(desc: str, cls: str = "GenericError", **echo):
    return {"error": {"class": cls, "desc": desc}, **echo}


def test_greeting():
    version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "x"}
    assert json.loads(session.greeting(version)) == {
        "QMP": {"version": version, "capabilities": ["oob"]}
    }


def test_event_line():
    line = session.event("STOP", None, 1_700_000_000_123_456_789)
    assert json.loads(line) == {
        "event": "STOP",
        "timestamp": {"seconds": 1700000000, "microseconds": 123456},
    }
    assert json.loads(session.event("X", {"a": 1}, 0))["data"] == {"a": 1}


# A request in command mode and its answer.
REQUESTS = {
    b'{"execute":"query-name"}': {"return": "query-name"},
    b'{"execute":"query-name","arguments":{}}': {"return": "query-name"},
    b'{"execute":"query-name","id":null}': {"return": "query-name", "id": None},
    b'{"id":{"a":[1.5]},"execute":"query-name"}': {
        "return": "query-name",
        "id": {"a": [1.5]},
    },
    b'{"execute":"query-name","id":18446744073709551615}': {
        "return": "query-name",
        "id": 2**64 - 1,
    },
    b"{]": error("JSON parse error, expecting value"),
    b"[]": error("QMP input must be a JSON object"),
    b"42 ": error("QMP input must be a JSON object"),
    b"{}": error("QMP input lacks member 'execute'"),
    b'{"id":1}': error("QMP input lacks member 'execute'", id=1),
    b'{"execute":1,"id":2}': error("QMP input member 'execute' must be a string", id=2),
    b'{"execute":"query-name","arguments":null}': error(
        "QMP input member 'arguments' must be an object"
    ),
    b'{"execute":"query-name","arguments":[]}': error(
        "QMP input member 'arguments' must be an object"
    ),
    b'{"execute":"query-name","foo":1,"id":"x"}': error(
        "QMP input member 'foo' is unexpected", id="x"
    ),
    b'{"exec-oob":"migrate-pause","id":3}': error(
        "QMP input member 'exec-oob' is unexpected", id=3
    ),
    b'{"execute":"Query-Name"}': error(
        "The command Query-Name has not been found", "CommandNotFound"
    ),
    b'{"execute":"query_name","arguments":{"x":1}}': error(
        "The command query_name has not been found", "CommandNotFound"
    ),
    b'{"execute":"query-status"}': error(
        "The command query-status has not been found", "CommandNotFound"
    ),
    b'{"execute":"qmp_capabilities"}': error(
        "Capabilities negotiation is already complete, command ignored",
        "CommandNotFound",
    ),
    b'{"execute":"query-name","arguments":{"x":1},"id":4}': error(
        "Parameter 'x' is unexpected", id=4
    ),
    b'{"execute":"migrate_pause"}': {"return": "migrate_pause"},
    b'{"execute":"migrate-pause"}': {"return": "migrate-pause"},
}

OOB_REQUESTS = {
    b'{"exec-oob":"migrate-pause","id":1}': {"return": "migrate-pause", "id": 1},
    b'{"exec-oob":"migrate_pause"}': {"return": "migrate_pause"},
    b'{"exec-oob":"query-name","id":1}': error(
        "The command query-name does not support OOB", id=1
    ),
    b'{"exec-oob":"nope"}': error(
        "The command nope has not been found", "CommandNotFound"
    ),
    b'{"exec-oob":1}': error("QMP input member 'exec-oob' must be a string"),
    b'{"execute":"query-name","exec-oob":"migrate-pause"}': error(
        "QMP input member 'exec-oob' clashes with 'execute'"
    ),
    b'{"exec-oob":"migrate-pause","execute":"query-name"}': error(
        "QMP input member 'execute' clashes with 'exec-oob'"
    ),
}


@pytest.mark.parametrize("request_", REQUESTS, ids=repr)
def test_requests(request_):
    assert ask(request_) == [REQUESTS[request_]]


@pytest.mark.parametrize("request_", OOB_REQUESTS, ids=repr)
def test_requests_with_out_of_band_enabled(request_):
    assert ask(request_, oob=True) == [OOB_REQUESTS[request_]]


def test_a_deep_id_comes_back():
    deep = b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1)
    talk = Session(COMMANDS)
    talk.feed(b'{"execute":"nope","id":' + deep + b"}")
    assert next_step(talk).line.count(b"[") == MAX_NESTING - 1


# --- negotiation ---

EXPECTING = error(
    "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
)


@pytest.mark.parametrize("name", ["query-name", "nope", "quit"])
def test_nothing_works_before_negotiation(name):
    talk = Session(COMMANDS)
    talk.feed(json.dumps({"execute": name}).encode())
    assert drain(talk) == [EXPECTING]
    assert not talk.negotiated


def test_malformed_input_before_negotiation():
    talk = Session(COMMANDS)
    talk.feed(b'[] {"execute":"x","y":1} {]')
    assert [reply["error"]["desc"] for reply in drain(talk)] == [
        "QMP input must be a JSON object",
        "QMP input member 'y' is unexpected",
        "JSON parse error, expecting value",
    ]


def test_wrong_arguments_leave_negotiation_open():
    talk = Session(COMMANDS)
    talk.feed(b'{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}')
    assert drain(talk) == [error("Parameter 'null' does not accept value 'x'")]
    assert not talk.negotiated
    talk.feed(NEGOTIATE)
    assert drain(talk) == [{"return": {}}]
    assert talk.negotiated
    assert not talk.oob


def test_pipelined_behind_the_negotiation():
    talk = Session(COMMANDS)
    pause = b'{"exec-oob":"migrate-pause","id":2}'
    talk.feed(NEGOTIATE_OOB + pause)
    assert drain(talk) == [{"return": {}}, {"return": "migrate-pause", "id": 2}]


# --- order ---


def numbered(number: int, name: str = "query-name", key: str = "execute") -> bytes:
    return json.dumps({key: name, "id": number}).encode()


def oob_session() -> Session:
    talk = Session(COMMANDS)
    talk.feed(NEGOTIATE_OOB)
    drain(talk)
    return talk


def test_in_band_order_includes_malformed_requests():
    replies = ask(numbered(1), b'{"id":2}', b"{]", numbered(3))
    assert [reply.get("id") for reply in replies] == [1, 2, None, 3]


def test_without_out_of_band_one_request_at_a_time():
    talk = Session(COMMANDS)
    talk.feed(NEGOTIATE + numbered(1) + numbered(2))
    assert list(talk.out_of_band()) == []
    assert talk.in_band() is not None
    assert not talk.wants_data
    talk.finish()
    assert talk.in_band() is None  # until the next one has been let in
    assert [reply["id"] for reply in drain(talk)] == [1, 2]
    assert talk.wants_data
    assert not talk.pending


def test_out_of_band_overtakes_the_queue():
    talk = oob_session()
    talk.feed(numbered(1) + numbered(2) + numbered(3, "migrate-pause", "exec-oob"))
    assert [answer(step)["id"] for step in talk.out_of_band()] == [3]
    assert [reply["id"] for reply in drain(talk)] == [1, 2]


def test_malformed_out_of_band_is_answered_at_once():
    talk = oob_session()
    talk.feed(numbered(1) + numbered(2, "nope", "exec-oob") + b'{"id":3}')
    assert [answer(step)["id"] for step in talk.out_of_band()] == [2]
    assert [reply["id"] for reply in drain(talk)] == [1, 3]


def test_a_full_queue_holds_up_out_of_band_requests():
    talk = oob_session()
    pause = numbered(99, "migrate-pause", "exec-oob")
    talk.feed(b"".join(map(numbered, range(QUEUE_LIMIT))) + pause)
    assert list(talk.out_of_band()) == []
    assert not talk.wants_data
    assert answer(talk.in_band())["id"] == 0
    talk.finish()
    assert [answer(step)["id"] for step in talk.out_of_band()] == [99]
    assert talk.wants_data


def test_a_failure_keeps_its_class():
    talk = Session(COMMANDS)
    talk.feed(NEGOTIATE + numbered(1))
    next_step(talk)
    talk.finish()
    failed = next_step(talk).failure(
        CommandError("Instance not found", "DeviceNotFound")
    )
    assert json.loads(failed) == error("Instance not found", "DeviceNotFound", id=1)
