"""Where `srcd recover` finds the ends, and where the source connects."""

from __future__ import annotations

import pytest

from common import address
from srcd.ends import Place, reachable, uri

HERE = "/run/postcopyd/srcd-web1.qmp"


@pytest.mark.parametrize(
    ("text", "host", "socket"),
    [
        ("/run/x", None, "/run/x"),
        ("ssh", None, "ssh"),
        ("ssh:web2:/run/x", "web2", "/run/x"),
        ("ssh:root@web2:/run/x", "root@web2", "/run/x"),
        ("ssh:fe80::2:/run/x", "fe80::2", "/run/x"),
        ("ssh:web2", "web2", "/run/postcopyd/dstd-web1.qmp"),
    ],
)
def test_places(text: str, host: str | None, socket: str) -> None:
    assert Place.parse(text, HERE) == Place(host, socket)


@pytest.mark.parametrize("text", ["ssh:", "ssh::/run/x", "ssh:-oX=y", "ssh:-x:/run/x"])
def test_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="names no host"):
        Place.parse(text, HERE)


@pytest.mark.parametrize("beside", ["/run/qemu.qmp", "srcd.qmp"])
def test_a_socket_that_is_not_called_like_ours(beside: str) -> None:
    with pytest.raises(ValueError, match="ssh:HOST:SOCKET"):
        Place.parse("ssh:web2", beside)


@pytest.mark.parametrize(
    ("listening", "wanted", "connect"),
    [
        ("tcp:10.0.0.2:4444", None, "tcp:10.0.0.2:4444"),
        ("tcp:0.0.0.0:4444", None, "tcp:web2:4444"),
        ("tcp:[::]:4444", None, "tcp:web2:4444"),
        ("tcp:[fe80::2]:4444", None, "tcp:[fe80::2]:4444"),
        ("tcp:10.0.0.2:4444", "tcp:web2.lan:4444", "tcp:web2.lan:4444"),
        ("tcp:10.0.0.2:40001", "tcp:web2.lan:0", "tcp:web2.lan:40001"),
        ("tcp:0.0.0.0:40001", "tcp::0", "tcp:web2:40001"),
        ("unix:/run/x", "tcp::0", "unix:/run/x"),
        ("vsock:2:1234", None, "vsock:2:1234"),
    ],
)
def test_where_the_source_connects(
    listening: str, wanted: str | None, connect: str
) -> None:
    target = address.parse(wanted) if wanted else None
    assert uri(reachable(address.parse(listening), target, "web2")) == connect
