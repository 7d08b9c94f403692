"""The package, taken apart from its two ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import SECTIONS

from common.errors import StreamError
from common.stream import command, section
from common.stream import constants as c
from common.stream.package import Package, encode_package, split_package_untrusted

LISTEN = command.encode(command.Listen())
RUN = command.encode(command.Run())
PING = command.encode(command.Ping(3))

opaque = st.builds(
    lambda body, ids: section.encode_section(
        section.Full(section_id=ids, name="device", instance=0, version=1), body
    ),
    st.binary(max_size=50) | st.sampled_from([LISTEN, RUN, PING, PING + RUN, b"\x7e"]),
    st.integers(0, 2**32 - 1),
)
packages = st.builds(
    Package,
    sections=st.lists(opaque, max_size=4).map(b"".join),
    pings=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    listen=st.booleans(),
    run=st.booleans(),
)


@given(packages)
def test_round_trip(value):
    """Whatever the device state looks like, commands inside it included."""
    assert split_package_untrusted(encode_package(value)) == value


@pytest.mark.parametrize(
    ("blob", "value"),
    [
        (b"", Package(sections=b"", pings=(), listen=False, run=False)),
        (LISTEN, Package(sections=b"", pings=(), run=False)),
        (RUN, Package(sections=b"", pings=(), listen=False)),
        (LISTEN + RUN, Package(sections=b"", pings=())),
        (
            LISTEN + SECTIONS + PING + command.encode(command.Ping(0x42)) + RUN,
            Package(sections=SECTIONS, pings=(c.PING_LOADED, 0x42)),
        ),
        (LISTEN + SECTIONS, Package(sections=SECTIONS, pings=(), run=False)),
    ],
)
def test_shapes(blob, value):
    assert split_package_untrusted(blob) == value


@pytest.mark.parametrize(
    ("blob", "complaint"),
    [
        (LISTEN + LISTEN + RUN, "begin"),
        (LISTEN + SECTIONS + RUN + RUN, "end"),
        (LISTEN + SECTIONS[:-1] + RUN, "end"),
        (LISTEN + b"\x04" + RUN, "end"),
        (LISTEN + b"\x00" + SECTIONS + RUN, "begin"),
        (LISTEN + SECTIONS + b"\x00" + RUN, "end"),
    ],
)
def test_refused(blob, complaint):
    with pytest.raises(StreamError, match=complaint):
        split_package_untrusted(blob)


def test_ping_limit():
    at = Package(sections=b"", pings=(1,) * c.MAX_PINGS)
    assert split_package_untrusted(encode_package(at)) == at
    over = Package(sections=b"", pings=(1,) * (c.MAX_PINGS + 1))
    with pytest.raises(StreamError, match="pings"):
        split_package_untrusted(encode_package(over))
