"""Where log messages go: to a person's terminal, or to the journal.

systemd connects standard error to the journal and says so in $JOURNAL_STREAM,
systemd.exec(5). Then messages go to the journal's own socket, whole and with
fields that can be searched for: systemd.journal-fields(7) and systemd's
JOURNAL_NATIVE_PROTOCOL. If that does not take one it goes to standard error,
where every line begins with its priority, sd-daemon(3).
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import uuid
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

_PRIORITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


def set_up(program: str, environ: Mapping[str, str] = os.environ) -> None:
    """Log from `info` on to standard error, in the form that its reader wants."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if goes_to_journal(sys.stderr.fileno(), environ):
        handler = Journal(program)
        handler.setFormatter(Prioritized())
    else:
        text = f"{program}: %(levelname)s: %(message)s"
        handler.setFormatter(logging.Formatter(text))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def goes_to_journal(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a descriptor is the connection that $JOURNAL_STREAM speaks of.

    A parent may have set the variable for a descriptor that we do not have.
    """
    status = os.fstat(fd)
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Prioritized(logging.Formatter):
    """Every line of a message with its priority in front, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


SOCKET: Final = "/run/systemd/journal/socket"
# Members of `extra` in a call of the log, and the fields that they become.
FIELDS: Final = {"old": "POSTCOPYD_STATUS_BEFORE", "new": "POSTCOPYD_STATUS"}
MIGRATION: Final = "POSTCOPYD_MIGRATION"
"""One value for all that is said of one migration by one daemon."""

_migration = ""


def begin_migration() -> None:
    """What is logged from now on is about another migration."""
    global _migration
    _migration = uuid.uuid4().hex


class Journal(logging.StreamHandler[TextIO]):
    """Sends each record as one entry; `path` is the journal's socket."""

    def __init__(self, program: str, path: str = SOCKET) -> None:
        super().__init__(sys.stderr)
        self._program = program
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(self.entry(record), self._path)
        except OSError:
            super().emit(record)

    def entry(self, record: logging.LogRecord) -> bytes:
        """The datagram of a record."""
        fields = {
            "MESSAGE": _plain.format(record),
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": self._program,
        }
        if _migration:
            fields[MIGRATION] = _migration
        for member, name in FIELDS.items():
            if (value := getattr(record, member, None)) is not None:
                fields[name] = str(value)
        return b"".join(_field(name, value) for name, value in fields.items())


_plain: Final = logging.Formatter("%(message)s")


def _field(name: str, value: str) -> bytes:
    """In the form for values of any content: a length in front."""
    content = value.encode(errors="replace")
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(content)), content)
