"""An address to listen at that has to be known before somebody listens there."""

from __future__ import annotations

import socket


def free_address() -> str:
    """Of this host; while a QEMU is paused, it does not tell which port it chose."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp:127.0.0.1:{server.getsockname()[1]}"
