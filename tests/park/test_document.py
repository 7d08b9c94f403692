"""docs/parking.md: its session is played line by line, its commands parsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from integration.test_documents import ROOT, Session, words_of

from dstd.cli import parse as parse_dstd
from srcd.cli import parse as parse_srcd

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = ROOT / "docs" / "parking.md"


def test_daemons_take_their_command_lines() -> None:
    source, destination = words_of("srcd", DOCUMENT), words_of("dstd", DOCUMENT)
    assert len(source) >= 4
    assert len(destination) >= 1
    for words in source:
        parse_srcd(words)
    for words in destination:
        parse_dstd(words)


@pytest.mark.qemu
@pytest.mark.linux
@pytest.mark.userfaultfd
def test_there_and_back_by_hand(private_dir: Path) -> None:
    with Session(private_dir, document=DOCUMENT) as session:
        session.play("There and back by hand")
        session.play("Parking it")
        session.play("What is there")
        session.play("Running it again")
        shown = session.output["srcd inspect /srv/parked/web1"]
        assert "pc-i440fx" in shown
        assert "pc.ram" in shown
