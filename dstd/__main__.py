"""`dstd`: argv to configuration to the daemon."""

from __future__ import annotations

import logging
import sys

from dstd.cli import parse


def main() -> None:
    config = parse()
    logging.basicConfig(
        level=logging.INFO, format="dstd: %(levelname)s: %(message)s", stream=sys.stderr
    )
    # Only now: a usage error should not wait for these.
    import trio

    from common.errors import MigrationError, cause_of
    from dstd.daemon import serve

    try:
        sys.exit(trio.run(serve, config))
    except (MigrationError, ExceptionGroup, OSError) as error:
        cause = error if isinstance(error, OSError) else cause_of(error)
        if cause is None:
            raise
        sys.exit(f"dstd: {cause}")


if __name__ == "__main__":
    main()
