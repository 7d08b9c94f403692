"""The two hosts, booted once for all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts.bed import Bed
from support import installed

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Nothing here is skipped: a machine that cannot boot them has tested nothing."""
    destination = tmp_path_factory.mktemp("installed")
    # Everybody on the hosts may see what is installed there.
    destination.chmod(0o755)
    installed.make("install", destination)
    with Bed(destination, tmp_path_factory.mktemp("bed")) as hosts:
        yield hosts


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A guest of this test alone: no unit, file or journal entry is another's."""
    words = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return words.removeprefix("test-").rstrip("-")[:40]
