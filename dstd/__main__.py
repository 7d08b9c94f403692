"""`dstd`: argv to configuration to the daemon."""

from __future__ import annotations

from dstd.cli import parse


def main() -> None:
    config = parse()
    # Only now: a usage error should not wait for these.
    from common.service import run
    from dstd.daemon import serve

    run("dstd", config, serve)


if __name__ == "__main__":
    main()
