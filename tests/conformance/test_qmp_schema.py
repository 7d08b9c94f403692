"""Introspection: what a daemon and QEMU both have, they describe alike.

Differences that are meant, nearly all of them additions, stand in
docs/qmp-differences.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support import differences as meant
from support import introspection
from support.daemons import Destination, Source
from support.introspection import Difference
from support.parked import ram_arguments, shared_ram
from support.qemu import Qemu
from support.ram import MIB, Block

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def qemu() -> Iterator[Qemu]:
    with Qemu(Block("ram", 16 * MIB)) as qemu:
        yield qemu


@pytest.fixture(params=[Source, Destination], ids=["source", "destination"])
def daemon(request, private_dir: Path, qemu: Qemu) -> Iterator[Any]:
    with (
        shared_ram(qemu) as rams,
        request.param(private_dir, *ram_arguments(qemu, rams)) as daemon,
    ):
        yield daemon


def entities(asked: Any) -> introspection.Entities:
    return introspection.by_name(asked.execute("query-qmp-schema"))


def test_what_both_have_is_the_same(qemu: Qemu, daemon: Any) -> None:
    found = introspection.differences(entities(qemu), entities(daemon))
    rows = meant.rows("Schema")
    assert found == sorted(Difference(r.subject, r.qemu, r.ours) for r in rows)
    assert all(row.why for row in rows)


def test_the_migration_is_all_there(qemu: Qemu, daemon: Any) -> None:
    both = introspection.shared(entities(qemu), entities(daemon))
    assert {"migrate", "migrate-recover", "query-migrate", "MIGRATION"} <= set(both)
    assert len(both) >= 30


def test_commands_besides_qemus_are_listed(qemu: Qemu, daemon: Any) -> None:
    ours = daemon.execute("query-commands")
    theirs = qemu.execute("query-commands")
    besides = {c["name"] for c in ours} - {c["name"] for c in theirs}
    rows = meant.rows("Commands")
    listed = {row.subject for row in rows}
    assert besides == listed


def test_events_besides_qemus_are_listed(qemu: Qemu, daemon: Any) -> None:
    ours, theirs = (
        {name for name, one in entities(side).items() if one["meta-type"] == "event"}
        for side in (daemon, qemu)
    )
    assert ours - theirs == {row.subject for row in meant.rows("Events")}


def test_every_type_is_defined_once(daemon: Any) -> None:
    schema = daemon.execute("query-qmp-schema")
    names = [entity["name"] for entity in schema]
    assert len(set(names)) == len(names)
    assert set(_referred_to(schema)) <= set(names)
    commands = {e["name"] for e in schema if e["meta-type"] == "command"}
    assert commands == {c["name"] for c in daemon.execute("query-commands")}


def _referred_to(entity: Any) -> Iterator[str]:
    """Every type that is named anywhere in an introspection."""
    if isinstance(entity, list):
        for item in entity:
            yield from _referred_to(item)
    elif isinstance(entity, dict):
        for key, value in entity.items():
            if key in ("type", "arg-type", "ret-type", "element-type"):
                yield value
            else:
                yield from _referred_to(value)
