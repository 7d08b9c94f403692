"""Where `srcd recover` finds the ends, and where the source connects."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from common import address
from srcd.ends import End, Place, Unreachable, reachable, uri

if TYPE_CHECKING:
    from pathlib import Path

HERE = "/run/postcopyd/srcd-web1.qmp"


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("/run/x", None, "/run/x"),
        ("ssh", None, "ssh"),
        ("ssh:web2:/run/x", "web2", "/run/x"),
        ("ssh:root@web2:/run/x", "root@web2", "/run/x"),
        ("ssh:fe80::2:/run/x", "fe80::2", "/run/x"),
        ("ssh:web2", "web2", "/run/postcopyd/dstd-web1.qmp"),
    ],
)
def test_places(text: str, host: str | None, path: str) -> None:
    assert Place.parse(text, HERE) == Place(host, path)


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


class Odd(threading.Thread):
    """A server at `path` that says these lines, each once it was spoken to."""

    def __init__(self, path: str, answers: tuple[str, ...]) -> None:
        super().__init__()
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(10)

    def run(self) -> None:
        with self._listener:
            sock, _ = self._listener.accept()
        sock.settimeout(10)
        with sock, sock.makefile("rw") as file:
            file.write('{"QMP": {}}\n')
            for answer in self._answers:
                file.flush()
                file.readline()
                file.write(answer + "\n")


@pytest.mark.parametrize(
    "answers",
    [
        ('{"error": {"class": "GenericError", "desc": "busy"}, "id": 1}',),
        ('{"return": {}, "id": 1}', '{"return": [], "id": 2}'),
        ('{"return": {}, "id": 1}', '{"id": 2}'),
        ('{"return": {}, "id": 1}', '{"error": {}, "id": 2}'),
        ('{"return": {}, "id": 1}', "[]"),
    ],
)
def test_no_server_of_migrations(private_dir: Path, answers: tuple[str, ...]) -> None:
    """Whatever is behind the socket, it is one sentence that says so."""
    path = str(private_dir / "odd")
    server = Odd(path, answers)
    server.start()
    with (
        pytest.raises(Unreachable, match=f"source: cannot talk to {path}: "),
        End("source", Place(None, path), 10) as end,
    ):
        end.look()
    server.join(10)
    assert not server.is_alive()
