"""What several modules of tests begin with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import installed, parked_machine
from support.microvm import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.parked_machine import Place


@pytest.fixture(scope="session")
def originals() -> Iterator[dict[str, Path]]:
    """A parked VM of each version of QEMU, made when it is asked for."""
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp") as path:
        yield parked_machine.Originals(Path(path))


@pytest.fixture
def place(originals: dict[str, Path], private_dir: Path) -> Place:
    """A copy of the one of QEMU 10."""
    return parked_machine.copied(originals, "10", private_dir)


@pytest.fixture
def bench(private_dir: Path) -> Iterator[Bench]:
    """Guest programs of the test's own, and a fake daemon for them."""
    bench = Bench(private_dir / "guest")
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def destination(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install` puts in place; tests only read it."""
    folder = tmp_path_factory.mktemp("installed")
    installed.make("install", folder)
    return folder
