"""Capabilities are not switched while a guest arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.daemons import (
    PREEMPT,
    Destination,
    Source,
    assert_unharmed,
    prepare,
)

from common.qmp.client import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.userfaultfd

SMALL = ("--memory", "32M", "--accel", "process")


def test_destination_refuses_during_postcopy(private_dir: Path) -> None:
    """Looking whether the host can do postcopy would end what is under way."""
    with Source(private_dir, *SMALL) as src, Destination(private_dir, *SMALL) as dst:
        before = src.wait_filled()
        prepare(src, dst, *PREEMPT)
        src.set_parameters(**{"max-postcopy-bandwidth": 1 << 20})
        src.migrate(dst.listen())
        src.execute("migrate-start-postcopy")
        assert dst.wait_status("postcopy-active", "failed") == "postcopy-active"
        for on in (False, True):
            wanted = [{"capability": name, "state": on} for name in PREEMPT]
            with pytest.raises(CommandFailed, match="migration process in progress"):
                dst.execute("migrate-set-capabilities", capabilities=wanted)
        src.set_parameters(**{"max-postcopy-bandwidth": 0})
        assert dst.wait_status("completed", "failed") == "completed", dst.query()
        assert_unharmed(dst, before)
