"""Starts a program as a service manager does: with sockets as descriptors from 3 on.

    python activate.py NAME=DESCRIPTOR… -- PROGRAM ARGUMENT…

The descriptors are this program's own. It has no manager's other qualities:
nothing is restarted, nothing is stored.
"""

from __future__ import annotations

import os
import sys
from fcntl import F_DUPFD, fcntl

FIRST = 3
AWAY = 100


def main(words: list[str]) -> None:
    end = words.index("--")
    given, command = [one.split("=") for one in words[:end]], words[end + 1 :]
    # First out of the way, then to their places: one may be in another's.
    copies = [fcntl(int(number), F_DUPFD, AWAY) for _, number in given]
    for place, copy in enumerate(copies, FIRST):
        os.dup2(copy, place)
        os.close(copy)
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.environ["LISTEN_FDS"] = str(len(given))
    os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _ in given)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
