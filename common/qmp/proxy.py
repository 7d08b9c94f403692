"""Joins standard input and output with a control socket.

What ssh starts on the other host, so that a client here reaches a socket there.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from contextlib import suppress
from typing import Final

AT_ONCE: Final = 1 << 16
STDIN: Final = 0
STDOUT: Final = 1


def join(path: str) -> int:
    """Until the server closes, which it does after our input; the exit status."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
        except OSError as error:
            print(f"cannot connect to {path}: {error.strerror}", file=sys.stderr)
            return 1
        # Either end may go away in the middle of a word.
        with suppress(BrokenPipeError, ConnectionResetError):
            _carry(server)
    return 0


def _carry(server: socket.socket) -> None:
    poll = select.poll()
    poll.register(STDIN, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            data = os.read(ready, AT_ONCE)
            if ready == STDIN:
                server.sendall(data)
            else:
                _write(data)
            if data:
                continue
            if ready != STDIN:
                return
            # What was asked last is still answered.
            poll.unregister(STDIN)
            server.shutdown(socket.SHUT_WR)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(STDOUT, data) :]
