"""Walks the status tables: every legal step is taken, every other refused.

A status that is added to an enum must be reachable by the walk, and the walks
written out below must visit it; otherwise a test here fails.
"""

from __future__ import annotations

import logging

import pytest

from common import status
from common.status import (
    INCOMING,
    OUTGOING,
    POSTCOPY,
    IllegalTransition,
    MigrationStatus,
    PostcopyState,
    StatusMachine,
)

TABLES = {"outgoing": OUTGOING, "incoming": INCOMING, "postcopy": POSTCOPY}
ENUMS = {
    "outgoing": MigrationStatus,
    "incoming": MigrationStatus,
    "postcopy": PostcopyState,
}
PAIRS = [
    pytest.param(table, old, new, id=f"{name}: {old} to {new}")
    for name, table in TABLES.items()
    for old in ENUMS[name]
    for new in ENUMS[name]
]

# What a daemon before this one may have come to.
LEFT_BEHIND = ["postcopy-paused", "completed", "failed"]

# Whole lives, in the order of QEMU's events.
WALKS = {
    "outgoing": [
        "setup active device completed setup failed setup",
        "setup cancelling cancelled setup active failed",
        "setup active pre-switchover device postcopy-active completed",
        "setup active pre-switchover cancelling cancelled",
        "setup active pre-switchover failed",
        "setup active cancelling cancelled",
        "setup active device cancelling cancelled",
        "setup active device failed",
        "setup active device postcopy-active failed",
        "setup active device postcopy-active postcopy-paused "
        "postcopy-recover-setup postcopy-paused "
        "postcopy-recover-setup postcopy-recover postcopy-paused "
        "postcopy-recover-setup postcopy-recover postcopy-active completed",
        *LEFT_BEHIND,
    ],
    "incoming": [
        "setup active completed",
        "setup active failed",
        "setup active postcopy-active completed",
        "setup active postcopy-active failed",
        "setup active postcopy-active postcopy-paused failed",
        "setup active postcopy-active postcopy-paused postcopy-recover failed",
        "setup active postcopy-active postcopy-paused postcopy-recover "
        "postcopy-paused postcopy-recover postcopy-active completed",
    ],
    "postcopy": [
        "advise discard listening running end",
        "advise listening running end",
        "advise end",
        "advise discard end",
        "advise listening end",
    ],
}


def walk(name: str, words: str) -> list[tuple[str, str]]:
    """Take the steps and return what the listeners heard."""
    machine = getattr(status, name)()
    heard: list[tuple[str, str]] = []
    machine.listeners.append(lambda old, new: heard.append((old, new)))
    for word in words.split():
        machine.set(ENUMS[name](word))
    return heard


@pytest.mark.parametrize("name", TABLES)
def test_walks_take_every_step_of_the_table(name):
    taken = {step for words in WALKS[name] for step in walk(name, words)}
    legal = {(old, new) for old, row in TABLES[name].items() for new in row}
    assert taken == legal


def test_walks_visit_every_status():
    migration = WALKS["outgoing"] + WALKS["incoming"]
    assert {"none", *" ".join(migration).split()} == set(MigrationStatus)
    assert {"none", *" ".join(WALKS["postcopy"]).split()} == set(PostcopyState)


@pytest.mark.parametrize("name", TABLES)
def test_every_state_has_a_row(name):
    assert set(TABLES[name]) == set(ENUMS[name])


@pytest.mark.parametrize(("table", "old", "new"), PAIRS)
def test_every_pair(table, old, new):
    machine = StatusMachine(table, old)
    heard = []
    machine.listeners.append(lambda *step: heard.append(step))
    legal = new in table[old]
    assert machine.may(new) is legal
    if legal:
        machine.set(new)
        assert (machine.now, heard) == (new, [(old, new)])
    else:
        with pytest.raises(IllegalTransition, match=f"{old} cannot become {new}"):
            machine.set(new)
        assert (machine.now, heard) == (old, [])


def test_a_migration_may_follow_any_that_has_ended():
    ended = {old for old, row in OUTGOING.items() if MigrationStatus.SETUP in row}
    assert ended == {"none", "completed", "failed", "cancelled"}


def test_no_postcopy_status_is_ever_cancelled_and_a_pause_waits_for_ever():
    for old, row in OUTGOING.items():
        if old.startswith("postcopy"):
            assert MigrationStatus.CANCELLING not in row
    assert OUTGOING[MigrationStatus.POSTCOPY_PAUSED] == {
        MigrationStatus.POSTCOPY_RECOVER_SETUP
    }


def test_only_device_leads_the_source_into_postcopy():
    """The guest is given up behind one status, after PONG 3 and no earlier."""
    before = {
        old for old, row in OUTGOING.items() if MigrationStatus.POSTCOPY_ACTIVE in row
    }
    assert before == {"device", "postcopy-recover"}


def test_listeners_hear_in_order_and_see_the_new_status():
    machine = status.outgoing()
    heard: list[tuple[int, str]] = []
    for number in (1, 2):
        machine.listeners.append(
            lambda _old, _new, number=number: heard.append((number, machine.now))
        )
    machine.set(MigrationStatus.SETUP)
    assert heard == [(1, "setup"), (2, "setup")]


def test_changes_are_logged(caplog):
    machine = status.incoming()
    with caplog.at_level(logging.INFO, logger="common.status"):
        machine.set(MigrationStatus.SETUP)
    (record,) = caplog.records
    assert record.getMessage() == "status none becomes setup"
    assert (record.old, record.new) == ("none", "setup")


def test_the_strings_are_those_of_qemu():
    """Clients compare them; a renamed one would be noticed by no other test."""
    assert {one.name: str(one) for one in MigrationStatus} == {
        "NONE": "none",
        "SETUP": "setup",
        "ACTIVE": "active",
        "PRE_SWITCHOVER": "pre-switchover",
        "DEVICE": "device",
        "POSTCOPY_ACTIVE": "postcopy-active",
        "POSTCOPY_PAUSED": "postcopy-paused",
        "POSTCOPY_RECOVER_SETUP": "postcopy-recover-setup",
        "POSTCOPY_RECOVER": "postcopy-recover",
        "COMPLETED": "completed",
        "CANCELLING": "cancelling",
        "CANCELLED": "cancelled",
        "FAILED": "failed",
    }
