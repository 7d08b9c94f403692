"""What can go wrong with a migration, branched by who can do something about it.

    MigrationError          catch this one and you have caught them all
    ├── ChannelLost         the network or the peer went away
    ├── StreamError         the peer sent what the format forbids
    ├── Refused             the peer refused, and said why
    ├── GuestError          the guest's process refused or died
    └── HostError           the kernel refused: a capability, a limit, a device
        └── Unusable        what the operator has named is something else

What each branch does to a migration:

    exception     before the switchover                    in postcopy
    ChannelLost   failed; the guest goes on at the source  postcopy-paused
    StreamError   failed; the guest goes on at the source  postcopy-paused
    Refused       failed; the guest goes on at the source  postcopy-paused
    GuestError    failed                                   failed where it was lost
    HostError     the command is refused                   postcopy-paused

An error carries its evidence as attributes and renders one sentence. Wrong use
of our own functions is a ValueError and not part of this tree.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class MigrationError(Exception):
    """The base of the tree; `message` is the sentence without its evidence."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ChannelLost(MigrationError):
    """The network or the peer went away.

    `channel` is "main" or "preempt" where it is known, `errno` the kernel's
    number if there was one: an orderly end of the channel has none.
    """

    def __init__(
        self, message: str, *, channel: str | None = None, errno: int | None = None
    ) -> None:
        super().__init__(message)
        self.channel = channel
        self.errno = errno

    def __str__(self) -> str:
        return self.message + _evidence(
            channel=self.channel, errno=_errno_name(self.errno)
        )


class StreamError(MigrationError):
    """The peer sent what the format forbids.

    `offset` counts bytes from the beginning of the stream, or of the piece that
    was being read; `expected` and `got` are the values that differ.
    """

    def __init__(
        self,
        message: str,
        offset: int | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        super().__init__(message)
        self.offset = offset
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return self.message + _evidence(
            offset=self.offset, expected=self.expected, got=self.got
        )


class Refused(MigrationError):
    """The peer refused the migration; `text` is its own sentence, if it sent one."""

    def __init__(self, text: str = "") -> None:
        super().__init__(f"the peer refused: {text or 'it gave no reason'}")
        self.text = text


class GuestError(MigrationError):
    """The guest's process refused `request`, or died if there was none."""

    def __init__(self, message: str, *, request: str | None = None) -> None:
        super().__init__(message)
        self.request = request

    def __str__(self) -> str:
        return self.message + _evidence(request=self.request)


class HostError(MigrationError):
    """The kernel refused; the message ends with what to change on this host."""

    def __init__(
        self, message: str, *, errno: int | None = None, path: str | None = None
    ) -> None:
        super().__init__(message)
        self.errno = errno
        self.path = path

    def __str__(self) -> str:
        return self.message + _evidence(errno=_errno_name(self.errno), path=self.path)


class Unusable(HostError):
    """What the operator has named is not what it is named for, and stays so.

    A daemon ends with the exit status of a wrong command line, so that nobody
    starts it again and again.
    """


# What tells most comes first: a peer that refuses also closes its channels.
_TELLING = (Refused, GuestError, HostError, StreamError, ChannelLost)


def cause_of(error: BaseException) -> MigrationError | None:
    """The error of this tree that tells most among those in a group; else None.

    None also if the group holds anything besides this tree: that is a fault of
    ours and not a failed migration.
    """
    found = tuple(_leaves(error))
    if not all(isinstance(leaf, MigrationError) for leaf in found):
        return None
    for kind in _TELLING:
        for leaf in found:
            if isinstance(leaf, kind):
                return leaf
    return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _evidence(**known: object) -> str:
    facts = [f"{k} {_show(v)}" for k, v in known.items() if v is not None]
    return f" ({', '.join(facts)})" if facts else ""


def _errno_name(number: int | None) -> str | None:
    return None if number is None else errno.errorcode.get(number, str(number))


def _show(value: object) -> str:
    """Numbers of the wire in hex, its bytes too; text cut to fit on a line."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value[:16]).hex(" ") or "nothing"
    if isinstance(value, int) and not isinstance(value, bool) and value > 9:
        return f"{value:#x}"
    text = str(value)
    return text[:100] if text.isprintable() else ascii(text[:100])
