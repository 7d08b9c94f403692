"""A note to whoever comes after this process: JSON in a file that outlives it.

The file has two slots and the note goes into them by turns, with a number and a
checksum. So a process that is killed while it writes leaves the note before.
The note is also a fence: whoever holds it holds the guest, and nobody else.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from common.errors import HostError
from common.qmp import message

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from common.qmp.message import Json

SLOT: Final = 64 << 10
LENGTH: Final = 2 * SLOT
"""Bytes of the file."""
_HEAD: Final = struct.Struct("<QII")  # number, length of the text, checksum of both


class Note:
    """The note in the file behind `fd`, which stays the caller's.

    HostError if another process holds it, or the file is too short.
    """

    def __init__(self, fd: int) -> None:
        # An open file of our own: the one behind `fd` is shared with whoever
        # keeps it, and would keep the lock as well.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_size < LENGTH:
                raise HostError(f"a kept note of less than {LENGTH} bytes")
            self._number, self._text = max(self._slot(0), self._slot(1))
        except BlockingIOError:
            os.close(self._fd)
            raise HostError(
                "another daemon still holds this guest; end it first"
            ) from None
        except BaseException:
            os.close(self._fd)
            raise

    def _slot(self, index: int) -> tuple[int, bytes]:
        """Number and text of a slot; (0, b"") if nothing whole is in it."""
        slot = os.pread(self._fd, SLOT, index * SLOT)
        number, length, checksum = _HEAD.unpack_from(slot)
        text = slot[_HEAD.size : _HEAD.size + length]
        if not text or len(text) != length or _checksum(number, text) != checksum:
            return 0, b""
        return number, text

    @property
    def is_blank(self) -> bool:
        """Nothing was ever written, not even a part."""
        return not any(os.pread(self._fd, LENGTH, 0))

    def read_untrusted(self) -> Mapping[str, Json] | None:
        """What was written last; None: nothing, or nothing that is a note."""
        try:
            content = message.decode_packet(self._text) if self._text else None
        except ValueError:
            return None
        return content if isinstance(content, dict) else None

    def write(self, content: Mapping[str, Json]) -> None:
        """Replace the note; HostError, or ValueError if it is too long for a slot."""
        text = message.encode(content)
        if len(text) > SLOT - _HEAD.size:
            raise ValueError(f"a note of {len(text)} bytes")
        self._number += 1
        head = _HEAD.pack(self._number, len(text), _checksum(self._number, text))
        with _told():
            written = os.pwrite(self._fd, head + text, self._number % 2 * SLOT)
        if written != len(head + text):
            raise HostError("no room to write down what has to outlive this daemon")
        self._text = text

    def sync(self) -> None:
        """What was written is on the disk afterwards, which may take its time."""
        with _told():
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            "what has to outlive this daemon cannot be written down:"
            f" {error.strerror}; make room",
            errno=error.errno,
        ) from None


def _checksum(number: int, text: bytes) -> int:
    return zlib.crc32(text, number & 0xFFFFFFFF)
