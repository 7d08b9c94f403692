"""Where log messages go: to a person's terminal, or to the journal.

systemd connects standard error to the journal and says so in $JOURNAL_STREAM,
systemd.exec(5). There every line begins with its priority, sd-daemon(3), and
needs no name of the program: the journal knows.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final

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
    handler = logging.StreamHandler(sys.stderr)
    if goes_to_journal(handler.stream.fileno(), environ):
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
