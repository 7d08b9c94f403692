"""`dstd`: argv to configuration to the daemon, or to an answer."""

from __future__ import annotations

import sys

from common.config import Proxy, Question
from dstd.cli import parse


def main() -> None:
    asked = parse()
    # Only now: a usage error should not wait for these.
    if isinstance(asked, Question):
        from common.host.check import answer

        sys.exit(answer(asked, incoming=True))
    if isinstance(asked, Proxy):
        from common.qmp.proxy import join

        sys.exit(join(asked.socket))
    from common.service import run
    from dstd.daemon import serve

    run("dstd", asked, serve)


if __name__ == "__main__":
    main()
