"""`srcd`: argv to configuration to the daemon, or to an answer."""

from __future__ import annotations

import sys

from common.config import Proxy, Question
from srcd.cli import parse
from srcd.errand import Errand
from srcd.recover import RecoverOrder, recover


def main() -> None:
    asked = parse()
    # Only now: a usage error should not wait for these.
    if isinstance(asked, Question):
        from common.host.check import answer

        sys.exit(answer(asked, incoming=False))
    if isinstance(asked, Proxy):
        from common.qmp.proxy import join

        sys.exit(join(asked.socket))
    if isinstance(asked, RecoverOrder):
        sys.exit(recover(asked))
    if isinstance(asked, Errand):
        from srcd.library import run_errand

        sys.exit(run_errand(asked))
    from common.service import run
    from srcd.daemon import serve

    run("srcd", asked, serve)


if __name__ == "__main__":
    main()
