"""The control sockets: QEMU and the daemons are asked the same.

Every exchange is had with a QEMU and with a daemon, as source and as destination
that waits; what they say must be equal. The differences that are meant stand in
docs/qmp-differences.md, and an exchange named there must differ in that way.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from conformance import (
    exchanges_arguments,
    exchanges_hmp,
    exchanges_queries,
    exchanges_requests,
    exchanges_settings,
    exchanges_stream,
)
from support import differences
from support.daemons import Destination, Source
from support.exchanges import ENDS, Exchange, first_difference, replies
from support.parked import ram_arguments, shared_ram
from support.qemu import Qemu
from support.ram import MIB, Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.qemu

TABLES = (
    exchanges_stream,
    exchanges_requests,
    exchanges_arguments,
    exchanges_settings,
    exchanges_queries,
    exchanges_hmp,
)
EXCHANGES = [exchange for table in TABLES for exchange in table.EXCHANGES]
MEANT = differences.rows("Replies")
RAM = Block("ram", 16 * MIB)


@dataclass
class Partner:
    """A monitor to have exchanges with, and another to put things right again."""

    path: str
    execute: Callable[..., Any]
    defaults: Any

    def have(self, exchange: Exchange) -> bytes:
        said = exchange.with_monitor(self.path)
        if any(b"migrate-set-" in w or b"migrate_set_" in w for w in exchange.writes):
            off = exchanges_settings.turned(off=exchanges_settings.CAPABILITIES)
            self.execute("migrate-set-capabilities", **off)
            self.execute("migrate-set-parameters", **self.defaults)
        if b"stop" in b"".join(exchange.writes):
            self.execute("cont")
        return said


@pytest.fixture(scope="module")
def partners() -> Iterator[dict[str, tuple[Partner, Partner]]]:
    """For each end of a migration a QEMU and a daemon of ours."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="pc-", dir="/tmp"))
        yield {end: start(end, Path(folder), stack) for end in ENDS}


def start(end: str, folder: Path, stack: ExitStack) -> tuple[Partner, Partner]:
    path = f"{folder}/qemu-{end}"
    arguments = ("-qmp", f"unix:{path},server=on,wait=off")
    waits = end == "destination"
    qemu = stack.enter_context(Qemu(RAM, incoming=waits, arguments=arguments))
    rams = stack.enter_context(shared_ram(qemu))
    daemon = (Destination if waits else Source)(folder, *ram_arguments(qemu, rams))
    stack.enter_context(daemon)
    defaults = qemu.execute("query-migrate-parameters")
    return (
        Partner(path, qemu.monitor.execute, defaults),
        Partner(str(daemon.qmp_path), daemon.execute, defaults),
    )


@pytest.mark.parametrize(
    ("end", "exchange"),
    [
        pytest.param(end, exchange, id=f"{end} {exchange.name}")
        for exchange in EXCHANGES
        for end in exchange.ends
    ],
)
def test_they_say_the_same(partners, end: str, exchange: Exchange) -> None:
    qemu, daemon = partners[end]
    said = daemon.have(exchange)
    ours, theirs = replies(said), replies(qemu.have(exchange))
    meant = [r for r in MEANT if differences.matches(r.subject, exchange.name)]
    if not meant:
        if ours != theirs:
            # On a busy machine QEMU may forget what it has to say when its client
            # stops writing, or say it to the next one.
            theirs = replies(qemu.have(exchange))
        assert ours == theirs
    else:
        assert ours != theirs, "the document says that they differ"
        a, b = first_difference(theirs, ours)
        fits = [r for r in meant if differences.matches(r.qemu, a)]
        assert any(differences.matches(r.ours, b) for r in fits), (a, b)
    assert all(0x20 <= byte < 0x7F or byte in b"\r\n" for byte in said)


def test_there_are_enough() -> None:
    names = [(end, exchange.name) for exchange in EXCHANGES for end in exchange.ends]
    assert len(names) > 2000
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", MEANT, ids=lambda row: row.subject)
def test_every_difference_is_of_an_exchange(row: differences.Row) -> None:
    assert any(differences.matches(row.subject, e.name) for e in EXCHANGES)
    assert row.why
