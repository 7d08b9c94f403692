"""The scripts of docs/recovery.md, as they stand, from a migration that is paused."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.daemons import POSTCOPY, Source
from support.recover import EXAMPLES, INTERPRETERS, SCRIPTS, run
from support.recovery import LITTLE, in_postcopy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.recover import Run
    from support.recovery import Ends

pytestmark = [pytest.mark.userfaultfd]

scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
DONE, FAILED, USAGE = range(3)


def play(script: Callable[..., Run], ends: Ends, uri: str) -> Run:
    return script(ends.src.qmp_path, ends.dst.qmp_path, uri)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp:127.0.0.1:{server.getsockname()[1]}"


def goes_on(ends: Ends) -> None:
    for side in (ends.src, ends.dst):
        side.wait_status("postcopy-recover")
        side.wait_status("postcopy-active")
    ends.complete()


@scripts
def test_paused(private_dir: Path, script: Callable[..., Run]) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        assert play(script, ends, "tcp:127.0.0.1:1").stdout.endswith("goes on\n")
        for link in ends.relay.wait_links(1):
            link.reset()
        ends.assert_paused()
        here = ends.dst.ours["postcopy-pages"]
        done = play(script, ends, free_address())
        assert done.returncode == DONE, done
        assert done.stdout.endswith("postcopy goes on\n")
        assert done.stderr == ""
        goes_on(ends)
        assert ends.dst.ours["postcopy-pages"] > here
        done = play(script, ends, "tcp:127.0.0.1:1")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (
            DONE,
            "the migration is completed",
        )


@scripts
def test_only_the_source_has_noticed(
    private_dir: Path, script: Callable[..., Run]
) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        ends.relay.wait_links(1)[0].hang_up(0)
        ends.src.wait_status("postcopy-paused")
        done = play(script, ends, f"unix:{private_dir}/again")
        assert done.returncode == DONE, done
        ends.dst.wait_status("postcopy-paused")
        goes_on(ends)


@pytest.mark.parametrize("name", SCRIPTS)
def test_usage(name: str) -> None:
    done = run(*INTERPRETERS[name], str(EXAMPLES / name), "x")
    assert done.returncode == USAGE
    assert done.stderr.endswith("SOURCE DESTINATION URI\n")


@scripts
def test_nothing_to_recover(private_dir: Path, script: Callable[..., Run]) -> None:
    with Source(private_dir, *LITTLE) as src:
        done = script(src.qmp_path, src.qmp_path, "unix:/nowhere")
        assert done.returncode == FAILED, done
