"""Joins standard input and output with a control socket.

What ssh starts on the other host, so that a client here reaches a socket there.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

AT_ONCE: Final = 1 << 16
STDIN: Final = 0
STDOUT: Final = 1


def join(path: str) -> int:
    """Until the server closes, or whoever we speak for; the exit status."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
        except OSError as error:
            print(f"cannot connect to {path}: {error.strerror}", file=sys.stderr)
            return 1
        _carry({STDIN: server.fileno(), server.fileno(): STDOUT})
    return 0


def _carry(ways: Mapping[int, int]) -> None:
    """From each key to its value; an end of either is the end of both."""
    poll = select.poll()
    for giver in ways:
        poll.register(giver, select.POLLIN)
    while True:
        for giver, _ in poll.poll():
            try:
                data = os.read(giver, AT_ONCE)
                if not data:
                    return
                _write(ways[giver], data)
            except (BrokenPipeError, ConnectionResetError):
                return


def _write(taker: int, data: bytes) -> None:
    while data:
        data = data[os.write(taker, data) :]
