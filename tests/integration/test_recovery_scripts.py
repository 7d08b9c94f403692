"""What docs/recovery.md shows, as it stands, from a migration that is paused."""

from __future__ import annotations

import json
import shlex
import socket
from typing import TYPE_CHECKING, Any

import pytest
from integration.test_documents import ROOT, blocks
from support.daemons import POSTCOPY, Source
from support.ports import free_address
from support.recover import (
    EXAMPLES,
    INTERPRETERS,
    PATIENCE,
    SCRIPTS,
    begin,
    run,
)
from support.recovery import LITTLE, in_postcopy

from dstd.cli import parse as parse_dstd
from srcd.cli import parse as parse_srcd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.recover import Run
    from support.recovery import Ends

pytestmark = [pytest.mark.userfaultfd]

RUNBOOK = ROOT / "docs" / "recovery.md"
# Where it says that the destination listens.
SHOWN = "tcp:10.0.0.2:4444"
scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
DONE, FAILED, USAGE = range(3)


def play(script: Callable[..., Run], ends: Ends, uri: str) -> Run:
    return script(ends.src.qmp_path, ends.dst.qmp_path, uri)


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


@scripts
def test_the_address_is_taken_at_first(
    private_dir: Path, script: Callable[..., Any]
) -> None:
    """By a listener that closes a moment late, as a QEMU's own does."""
    with in_postcopy(private_dir, POSTCOPY) as ends:
        for link in ends.relay.wait_links(1):
            link.reset()
        ends.assert_paused()
        with socket.create_server(("127.0.0.1", 0)) as late:
            uri = f"tcp:127.0.0.1:{late.getsockname()[1]}"
            begun = script(ends.src.qmp_path, ends.dst.qmp_path, uri, begin)
            assert any("already in use" in line for line in begun.stdout)
        said, _ = begun.communicate(timeout=PATIENCE)
        assert begun.returncode == DONE, said
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


def shown(heading: str, uri: str) -> list[dict[str, Any]]:
    """The commands under that heading, but for the negotiation."""
    found = [b for b in blocks(RUNBOOK) if b.heading == heading]
    (text,) = [block for block in found if block.language == "json"]
    lines = [json.loads(line.replace(SHOWN, uri)) for line in text.lines]
    assert lines.pop(0) == {"execute": "qmp_capabilities"}
    return lines


def test_by_hand(private_dir: Path) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        for link in ends.relay.wait_links(1):
            link.reset()
        ends.assert_paused()
        uri = free_address()
        for side, heading in (
            (ends.dst, "First the destination"),
            (ends.src, "Then the source"),
        ):
            for line in shown(heading, uri):
                side.qmp.execute(line["execute"], line.get("arguments"))
        goes_on(ends)


def test_its_command_lines_are_taken() -> None:
    lines = [line for b in blocks(RUNBOOK) if b.language == "sh" for line in b.lines]
    words = [shlex.split(line) for line in lines]
    ours = [line for line in words if line[0] in ("srcd", "dstd")]
    assert len(ours) >= 4
    for program, *rest in ours:
        assert {"srcd": parse_srcd, "dstd": parse_dstd}[program](rest)
    for program, *_ in words:
        if program.startswith("docs/examples/"):
            assert (ROOT / program).exists()


def test_its_table_of_the_file_is_taken(tmp_path: Path) -> None:
    (table,) = [b.text for b in blocks(RUNBOOK) if b.language == "toml"]
    file = tmp_path / "config.toml"
    file.write_text(f'qmp = ["q"]\nmemory = "1G"\n{table}')
    for parse in (parse_srcd, parse_dstd):
        assert parse(["serve", "--config", str(file)]).parameters
