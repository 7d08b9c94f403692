"""Streams into files and commands and out of them, and what can go wrong there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import Destination, Source
from support.ram import MIB

from common.qmp.client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 4 * MIB


@contextmanager
def source(directory: Path) -> Iterator[Source]:
    path = directory / "source.ram"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with Source(directory, "--ram", f"ram={path}") as srcd:
        srcd.set_capabilities()
        yield srcd


@contextmanager
def destination(directory: Path) -> Iterator[Destination]:
    path = directory / "destination.ram"
    with Destination(directory, "--ram", f"ram={path},size={SIZE}") as dstd:
        dstd.set_capabilities()
        yield dstd


def assert_same_ram(directory: Path) -> None:
    sides = [directory / f"{side}.ram" for side in ("source", "destination")]
    assert sides[0].read_bytes() == sides[1].read_bytes()


def exec_channel(*words: str) -> list[dict[str, Any]]:
    address = {"transport": "exec", "args": list(words)}
    return [{"channel-type": "main", "addr": address}]


def test_command_has_ended_when_the_migration_has(private_dir: Path) -> None:
    stream, end = private_dir / "stream", private_dir / "end"
    with source(private_dir) as srcd:
        srcd.migrate(f"exec:cat > {stream}; cp {stream} {end}")
        assert srcd.wait_status("completed", "failed") == "completed"
        assert end.read_bytes() == stream.read_bytes() != b""
    with destination(private_dir) as dstd:
        dstd.execute("migrate-incoming", uri=f"exec:cat {end}; rm {end}")
        assert dstd.wait_status("completed", "failed") == "completed"
        assert not end.exists()
        assert_same_ram(private_dir)


def test_command_fails_at_its_end(private_dir: Path) -> None:
    """All was written, but who knows where: the guest stays here."""
    with source(private_dir) as srcd:
        srcd.migrate("exec:cat > /dev/null; exit 3")
        assert srcd.wait_status("completed", "failed") == "failed"
        assert "status 3" in srcd.query()["error-desc"]
        assert srcd.execute("query-status")["running"]
        srcd.migrate("exec:cat > /dev/null")
        assert srcd.wait_status("completed", "failed") == "completed"


def test_command_that_does_not_end_is_cancelled(private_dir: Path) -> None:
    """With all that it has started."""
    with source(private_dir) as srcd:
        srcd.migrate("exec:cat > /dev/null; sleep 1000")
        srcd.wait_status("device")
        srcd.execute("migrate_cancel")
        assert srcd.wait_status("cancelled", "failed") == "cancelled"
        assert srcd.execute("query-status")["running"]


def test_command_that_reads_nothing_is_cancelled(private_dir: Path) -> None:
    with source(private_dir) as srcd:
        srcd.migrate("exec:sleep 1000")
        srcd.wait_status("active")
        srcd.execute("migrate_cancel")
        assert srcd.wait_status("cancelled", "failed") == "cancelled"


def test_command_is_not_there(private_dir: Path) -> None:
    nothing = exec_channel("/nothing", "here")
    said = "Could not run '/nothing': No such file or directory"
    with source(private_dir) as srcd, destination(private_dir) as dstd:
        with pytest.raises(CommandFailed, match=said):
            srcd.execute("migrate", channels=nothing)
        assert srcd.wait_status("completed", "failed") == "failed"
        assert said in srcd.query()["error-desc"]
        with pytest.raises(CommandFailed, match=said):
            dstd.execute("migrate-incoming", channels=nothing)
        assert dstd.execute("query-status")["status"] == "inmigrate"


def test_file_is_not_there(private_dir: Path) -> None:
    """The destination says so at once, and can be told another file."""
    with source(private_dir) as srcd, destination(private_dir) as dstd:
        with pytest.raises(CommandFailed, match="Could not open '/nothing'"):
            dstd.execute("migrate-incoming", uri="file:/nothing")
        srcd.migrate(f"file:{private_dir}/stream")
        assert srcd.wait_status("completed", "failed") == "completed"
        dstd.execute("migrate-incoming", uri=f"file:{private_dir}/stream")
        assert dstd.wait_status("completed", "failed") == "completed"
        assert_same_ram(private_dir)


def test_file_is_cut_off(private_dir: Path) -> None:
    """Wherever it is: a destination that got less than all does not complete."""
    stream = private_dir / "stream"
    with source(private_dir) as srcd:
        srcd.migrate(f"file:{stream}")
        assert srcd.wait_status("completed", "failed") == "completed"
    whole = stream.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        stream.write_bytes(whole[:length])
        with destination(private_dir) as dstd:
            dstd.execute("migrate-incoming", uri=f"file:{stream}", exit_on_error=False)
            assert dstd.wait_status("completed", "failed") == "failed"
