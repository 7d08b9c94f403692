"""`srcd`: argv to configuration to the daemon."""

from __future__ import annotations

from srcd.cli import parse


def main() -> None:
    config = parse()
    # Only now: a usage error should not wait for these.
    from common.service import run
    from srcd.daemon import serve

    run("srcd", config, serve)


if __name__ == "__main__":
    main()
