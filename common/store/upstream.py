"""The socket in a directory by which pages are asked for before they have come.

Who fills the directory listens there once the VM is its own: so the socket's
name is also the sign that the VM can be served already. See csrc/arriving.h.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from common.store import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME: Final = "upstream"
_MODE: Final = 0o600


def is_here(directory: Path) -> bool:
    return (directory / NAME).exists()


def address(directory: int) -> str:
    """Of the socket in an open directory; short, whatever its path is."""
    return f"/proc/self/fd/{directory}/{NAME}"


@contextmanager
def listening(directory: Path) -> Iterator[int]:
    """The descriptor of a socket that is bound there; HostError if it cannot be.

    It takes the place of one that a process before this one has left, and its
    name stays when it is closed.
    """
    path = directory / NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        with files.named(path, "listen at"):
            os.fchmod(bound.fileno(), _MODE)
            opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with suppress(FileNotFoundError):
                    path.unlink()
                bound.bind(address(opened))
            finally:
                os.close(opened)
        yield bound.fileno()
