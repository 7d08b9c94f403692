"""The exception tree: one base, evidence as attributes, one sentence each."""

from __future__ import annotations

import inspect

import pytest

from common import errors
from common.errors import (
    ChannelLost,
    GuestError,
    HostError,
    MigrationError,
    Refused,
    StreamError,
    Unusable,
)

TREE = [ChannelLost, StreamError, Refused, GuestError, HostError, Unusable]


def test_the_drawing_shows_the_whole_tree():
    drawn = errors.__doc__ or ""
    classes = [
        (name, kind)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    ]
    assert {kind for _, kind in classes} == {MigrationError, *TREE}
    for name, _ in classes:
        assert f"── {name} " in drawn or f"    {name} " in drawn


@pytest.mark.parametrize("kind", TREE)
def test_the_base_catches_everything(kind):
    assert issubclass(kind, MigrationError)
    with pytest.raises(MigrationError):
        raise kind("it went wrong")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MigrationError("no"), "no"),
        (ChannelLost("the peer went away"), "the peer went away"),
        (
            ChannelLost("cannot write", channel="preempt", errno=104),
            "cannot write (channel preempt, errno ECONNRESET)",
        ),
        (StreamError("wrong magic"), "wrong magic"),
        (
            StreamError("wrong magic", 0, 0x5145564D, 0x11223344),
            "wrong magic (offset 0, expected 0x5145564d, got 0x11223344)",
        ),
        (
            StreamError("no name", got=b"\xff\n" + bytes(20)),
            "no name (got ff 0a 00 00 00 00 00 00 00 00 00 00 00 00 00 00)",
        ),
        (StreamError("no name", got=b""), "no name (got nothing)"),
        (StreamError("bad", got="a\nb"), "bad (got 'a\\nb')"),
        (StreamError("bad", got="\ud800"), "bad (got '\\ud800')"),
        (StreamError("bad", got="x" * 1000), f"bad (got {'x' * 100})"),
        (StreamError("bad", expected=True), "bad (expected True)"),
        (Refused("no such machine"), "the peer refused: no such machine"),
        (Refused(), "the peer refused: it gave no reason"),
        (GuestError("it said no", request="stop"), "it said no (request stop)"),
        (GuestError("it died"), "it died"),
        (
            HostError("not permitted", errno=1, path="/dev/userfaultfd"),
            "not permitted (errno EPERM, path /dev/userfaultfd)",
        ),
    ],
)
def test_sentence(error, sentence):
    assert str(error) == sentence
    assert "\n" not in sentence


def test_evidence():
    error = StreamError("wrong magic", 4, expected=3, got=2)
    assert (error.message, error.offset) == ("wrong magic", 4)
    assert (error.expected, error.got) == (3, 2)
    lost = ChannelLost("gone", channel="main", errno=32)
    assert (lost.channel, lost.errno) == ("main", 32)
    assert Refused("why").text == "why"
    assert GuestError("no", request="save").request == "save"
    host = HostError("no", errno=1, path="/x")
    assert (host.errno, host.path) == (1, "/x")
