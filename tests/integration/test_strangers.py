"""Somebody else connects to where a source is expected, and harms no guest."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.daemons import PREEMPT, Destination, assert_unharmed
from support.ram import MIB
from support.refusals import PATIENCE, PRECOPY, SMALL, source

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.userfaultfd


@pytest.mark.parametrize("capabilities", [PRECOPY, PREEMPT], ids=["plain", "preempt"])
@pytest.mark.parametrize(
    ("said", "texts"),
    [
        pytest.param(b"", ("closed",), id="nothing"),
        pytest.param(b"QEV", ("closed",), id="cut"),
        pytest.param(
            b"GET / HTTP/1.1\r\n\r\n", ("migration stream", "0x47455420"), id="http"
        ),
        pytest.param(
            bytes(range(256)) * 64, ("migration stream", "0x10203"), id="bytes"
        ),
        pytest.param(b"QEVM\0\0\0\2", ("version",), id="version"),
        pytest.param(
            b"\x11\x22\x33\x44" + bytes(60), ("multifd", "switch it off"), id="multifd"
        ),
    ],
)
def test_stranger_on_the_port(
    private_dir: Path,
    capabilities: tuple[str, ...],
    said: bytes,
    texts: tuple[str, ...],
) -> None:
    """It fails the incoming migration, as in QEMU, and nothing but that."""
    with Destination(private_dir, *SMALL, "--accel", "process") as dst:
        dst.set_capabilities(*capabilities)
        path = dst.listen(f"unix:{private_dir}/incoming").removeprefix("unix:")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            stranger.sendall(said)
        assert dst.wait_status("failed", "completed") == "failed"
        for text in texts:
            assert text in dst.query()["error-desc"]
        assert dst.execute("query-status") == {"status": "inmigrate", "running": False}
        assert "Traceback" not in dst.said


def test_stranger_beside_the_source(private_dir: Path) -> None:
    """Connections that nobody expects are closed and harm nobody."""
    with (
        source(private_dir) as src,
        Destination(private_dir, *SMALL, "--accel", "process") as dst,
    ):
        dst.set_capabilities()
        src.set_parameters(max_bandwidth=MIB)
        uri = dst.listen(f"unix:{private_dir}/incoming")
        src.migrate(uri)
        src.wait_status("active")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(PATIENCE)
            stranger.connect(uri.removeprefix("unix:"))
            assert stranger.recv(1) == b""
        before = src.report()
        src.set_parameters(max_bandwidth=0)
        assert src.wait_status("completed", "failed") == "completed", src.said
        assert dst.wait_status("completed", "failed") == "completed", dst.said
        assert_unharmed(dst, before)
