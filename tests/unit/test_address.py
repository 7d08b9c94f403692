"""Migration addresses: what each form means, and QEMU's words for what is wrong."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import address
from common.address import AddressError, Exec, Fd, File, Tcp, Unix, Vsock


@pytest.mark.parametrize(
    ("uri", "meaning", "text"),
    [
        ("tcp:localhost:4444", Tcp("localhost", "4444"), "localhost:4444"),
        ("tcp::4444", Tcp("", "4444"), ":4444"),
        ("tcp:0:0", Tcp("0", "0"), "0:0"),
        ("tcp:[::1]:4444", Tcp("::1", "4444"), "[::1]:4444"),
        ("tcp:host:65535", Tcp("host", "65535"), "host:65535"),
        ("tcp:host:ssh", Tcp("host", "ssh"), "host:ssh"),
        ("tcp:h:1,to=9", Tcp("h", "1", to=9), "h:1"),
        ("tcp:h:1,ipv4", Tcp("h", "1", ipv6=False), "h:1"),
        ("tcp:h:1,ipv4=off", Tcp("h", "1", ipv4=False), "h:1"),
        ("tcp:h:1,ipv6=on", Tcp("h", "1", ipv4=False), "h:1"),
        ("tcp:h:1,ipv6=on,ipv4=on", Tcp("h", "1"), "h:1"),
        ("tcp:h:1,keep-alive=on", Tcp("h", "1", keep_alive=True), "h:1"),
        ("vsock:2:1234", Vsock("2", "1234"), "2:1234"),
        ("fd:name", Fd("name"), "name"),
        ("file:/tmp/x,offset=1M", File("/tmp/x", 1 << 20), "/tmp/x"),
        ("unix:/run/a b", Unix("/run/a b"), "/run/a b"),
        ("file:/tmp/x", File("/tmp/x"), "/tmp/x"),
        ("file:/tmp/x,offset=0x1000", File("/tmp/x", 4096), "/tmp/x"),
        ("exec:cat >x", Exec(("/bin/sh", "-c", "cat >x")), "cat >x"),
    ],
)
def test_uri(uri: str, meaning: address.Address, text: str) -> None:
    assert address.parse(uri) == meaning
    assert str(meaning) == text
    assert address.of_arguments({"uri": uri}) == meaning


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", "unknown migration protocol: "),
        ("defer", "unknown migration protocol: defer"),
        ("tcp", "unknown migration protocol: tcp"),
        ("TCP:localhost:1", "unknown migration protocol: TCP:localhost:1"),
        ("rdma:host:1", "unknown migration protocol: rdma:host:1"),
        ("fd:", "invalid file descriptor address"),
        ("vsock:x", "error parsing address 'x'"),
        ("vsock:1:", "error parsing address '1:'"),
        ("vsock:x:1", "Failed to parse cid 'x'"),
        ("vsock:1:4294967296", "Failed to parse port '4294967296'"),
        ("tcp:h:1,bogus=1", "error parsing address 'h:1,bogus=1'"),
        ("tcp:h:1,ipv4=maybe", "error parsing 'ipv4' flag '=maybe'"),
        ("tcp:h:1,to=x", "error parsing to= argument"),
        ("tcp:h:1,to=65536", "port 65536 is larger than 65535"),
        (
            "tcp:h:1,ipv4=off,ipv6=off",
            "Cannot disable IPv4 and IPv6 at same time",
        ),
        ("tcp:", "error parsing address ''"),
        ("tcp:foo", "error parsing address 'foo'"),
        ("tcp:foo:", "error parsing address 'foo:'"),
        ("tcp:::1:4444", "error parsing address '::1:4444'"),
        ("tcp:host:65536", "port 65536 is larger than 65535"),
        ("unix:", "invalid Unix socket address"),
        ("file:x,offset=abc", "file URI has bad offset abc: Invalid argument"),
        ("file:x,offset=-1", "file URI has bad offset -1: Invalid argument"),
        (
            f"file:x,offset={1 << 63}",
            f"file URI has bad offset {1 << 63}: Invalid argument",
        ),
        ("unix:a\0b", "an address cannot contain a zero byte"),
        ("file:a\0b", "an address cannot contain a zero byte"),
        ("exec:a\0b", "an address cannot contain a zero byte"),
        ("tcp:a\0b:1", "an address cannot contain a zero byte"),
    ],
)
def test_bad_uri(uri: str, text: str) -> None:
    with pytest.raises(AddressError) as error:
        address.parse(uri)
    assert str(error.value) == text


def channel(**addr: Any) -> dict[str, Any]:
    return {"channels": [{"channel-type": "main", "addr": addr}]}


@pytest.mark.parametrize(
    ("addr", "meaning"),
    [
        (
            {"transport": "socket", "type": "inet", "host": "h", "port": "1"},
            Tcp("h", "1"),
        ),
        ({"transport": "socket", "type": "unix", "path": "/p"}, Unix("/p")),
        (
            {"transport": "socket", "type": "inet", "host": "h", "port": "1"}
            | {"to": 5, "ipv6": False, "keep-alive": True, "numeric": True},
            Tcp("h", "1", to=5, ipv6=False, keep_alive=True),
        ),
        (
            {"transport": "socket", "type": "unix", "path": "p", "abstract": True},
            Unix("p", abstract=True),
        ),
        (
            {"transport": "socket", "type": "vsock", "cid": "1", "port": "2"},
            Vsock("1", "2"),
        ),
        ({"transport": "socket", "type": "fd", "str": "name"}, Fd("name")),
        ({"transport": "file", "filename": "/f", "offset": 512}, File("/f", 512)),
        ({"transport": "exec", "args": ["cat", "-"]}, Exec(("cat", "-"))),
    ],
)
def test_channel(addr: dict[str, Any], meaning: address.Address) -> None:
    assert address.of_arguments(channel(**addr)) == meaning
    assert address.of_arguments(channel(**addr), incoming=True) == meaning


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "need either 'uri' or 'channels' argument"),
        ({"channels": []}, "need either 'uri' or 'channels' argument"),
        (
            {"uri": "unix:x"} | channel(transport="socket", type="unix", path="/p"),
            "need either 'uri' or 'channels' argument",
        ),
        (
            {"channels": channel(transport="exec", args=["a"])["channels"] * 2},
            "Channel list has more than one main entry",
        ),
        (
            {"channels": [{"channel-type": "cpr", "addr": {"transport": "exec"}}]},
            "Channel list must have only one entry, for type 'main'",
        ),
        (channel(transport="rdma", host="h"), "unknown migration protocol: rdma"),
        (channel(transport="exec", args=[]), "unknown migration protocol: exec"),
        (
            channel(transport="socket", type="inet", host="h", port="1", mptcp=True),
            "multipath TCP is not supported",
        ),
        (
            channel(transport="file", filename="/f", offset=1 << 63),
            f"file URI has bad offset {1 << 63}: Invalid argument",
        ),
        (
            channel(transport="exec", args=["a\0"]),
            "an address cannot contain a zero byte",
        ),
    ],
)
def test_bad_channel(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(AddressError) as error:
        address.of_arguments(arguments)
    assert str(error.value) == text


def test_incoming_takes_one_channel() -> None:
    two = {"channels": channel(transport="exec", args=["a"])["channels"] * 2}
    with pytest.raises(AddressError) as error:
        address.of_arguments(two, incoming=True)
    text = "Channel list must have only one entry, for type 'main'"
    assert str(error.value) == text


@pytest.mark.parametrize("text", ["tcp:[::1]:4444", "unix:/run/x", "vsock:2:1234"])
def test_kept_for_another_process(text: str) -> None:
    found = address.parse(text)
    assert address.of_json_untrusted(address.to_json(found)) == found


@pytest.mark.parametrize(
    "kept",
    [
        None,
        7,
        {},
        {"type": "exec", "arguments": ["x"]},
        {"type": "tcp", "host": "h"},
        {"type": "tcp", "host": 5, "port": "1"},
        {"type": "tcp", "host": "h", "port": "1", "to": "2"},
        {"type": "unix", "path": ["/x"]},
        {"type": "unix", "path": "/x", "more": "y"},
    ],
)
def test_kept_and_no_address(kept: Any) -> None:
    assert address.of_json_untrusted(kept) is None


SCHEMES = ["tcp:", "unix:", "vsock:", "fd:", "file:", "exec:", ""]


@given(scheme=st.sampled_from(SCHEMES), rest=st.text())
def test_any_uri(scheme: str, rest: str) -> None:
    with suppress(AddressError):
        address.parse(scheme + rest)
