"""A file system that has no room for the VM that is being parked, or only later."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from conformance.test_park import (
    CRAWL,
    FAST,
    SLOW,
    Ends,
    check,
    ends,
    postcopies,
    until,
)
from support.ram import MIB

from common.errors import HostError
from common.store.directory import Parked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu


@pytest.fixture
def small_dir(private_dir: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tmpfs of so many MiB; parametrized indirectly, or with room for all."""
    size = getattr(request, "param", 128)
    options = f"size={size}m,nr_inodes=64"
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(private_dir)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs can't be mounted: that takes root")
    try:
        yield private_dir
    finally:
        subprocess.run(["umount", "-l", str(private_dir)], check=True)


@contextlib.contextmanager
def no_more_files(where: Path) -> Iterator[None]:
    """Nothing new can be made there; what is there can grow."""
    filler = []
    with contextlib.suppress(OSError):
        for number in range(64):
            path = where / f"filler-{number}"
            path.touch()
            filler.append(path)
    assert len(filler) < 64
    try:
        yield
    finally:
        for path in filler:
            path.unlink()


@contextlib.contextmanager
def no_more_bytes(where: Path) -> Iterator[None]:
    path = where / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(MIB))
    try:
        yield
    finally:
        path.unlink()


def error(found: Ends) -> str:
    return str(found.dstd.query().get("error-desc", ""))


@pytest.mark.parametrize("small_dir", [32], indirect=True)
def test_refused_before_a_file_is_made(small_dir: Path) -> None:
    with ends(small_dir) as found:
        found.migrate("precopy", SLOW)
        said = found.fail()
        assert "the guest has 64 MiB of RAM" in said
        assert "make room on that file system" in said
        assert not (found.directory / "ram-0000").exists()


def test_not_parked_so_the_source_goes_on(small_dir: Path) -> None:
    with ends(small_dir) as found:
        found.migrate("precopy", SLOW)
        until(lambda: found.dstd.ours["precopy-pages"] > 100)
        with no_more_files(small_dir):
            found.qemu.set_parameters(max_bandwidth=FAST)
            assert "No space left on device; make room" in found.fail()
        with pytest.raises(HostError, match="is incomplete"):
            Parked.open(found.directory)


def test_a_source_that_does_not_wait(small_dir: Path) -> None:
    """It said that it is done when it had sent all: so all is kept."""
    with ends(small_dir) as found:
        found.migrate("plain", SLOW)
        until(lambda: found.dstd.ours["precopy-pages"] > 100)
        with no_more_files(small_dir):
            found.qemu.set_parameters(max_bandwidth=FAST)
            found.qemu.wait_status("completed")
            until(lambda: "not parked yet" in error(found))
        assert found.dstd.wait_status("completed", "failed") == "completed"
        assert not error(found)
        check(found).close()


@postcopies
def test_a_source_that_has_given_it_up_waits(small_dir: Path, mode: str) -> None:
    with ends(small_dir) as found:
        found.into_postcopy(mode, CRAWL)
        with no_more_files(small_dir):
            found.qemu.set_parameters(max_postcopy_bandwidth=FAST)
            until(lambda: "not parked yet" in error(found))
            assert found.qemu.query()["status"] == "postcopy-active"
        found.complete()
        assert not error(found)
        check(found, described=False).close()


def test_no_room_for_pages_in_postcopy(small_dir: Path) -> None:
    """It pauses, and goes on when there is room again."""
    with ends(small_dir) as found:
        found.into_postcopy("postcopy", CRAWL)
        with no_more_bytes(small_dir):
            found.qemu.set_parameters(max_postcopy_bandwidth=FAST)
            for side in (found.qemu, found.dstd):
                side.wait_status("postcopy-paused")
            assert "ENOSPC" in error(found) or "No space" in error(found)
        uri = f"unix:{small_dir}/again"
        found.dstd.execute("migrate-recover", uri=uri)
        found.qemu.migrate(uri, resume=True)
        found.complete()
        check(found, described=False).close()
