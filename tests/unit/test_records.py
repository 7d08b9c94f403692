"""What the daemons keep of a migration is read as it was written, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from common.errors import HostError
from common.stream.constants import MIGRATIONS
from dstd import record as incoming
from srcd import record as outgoing

both = pytest.mark.parametrize("module", [outgoing, incoming], ids=["srcd", "dstd"])


def kept(record):
    return json.loads(json.dumps(asdict(record)))


@both
@pytest.mark.parametrize("number", [None, 0, 1, MIGRATIONS - 1])
def test_round_trip(module, number):
    record = module.Record(migration=number)
    assert module.record_of_untrusted(kept(record)) == record


@both
def test_of_a_daemon_that_knew_no_numbers(module):
    content = kept(module.Record(migration=7))
    del content["migration"]
    assert module.record_of_untrusted(content).migration is None


@both
@pytest.mark.parametrize("number", [-1, MIGRATIONS, "7", 7.0, [7]])
def test_no_number(module, number):
    with pytest.raises(HostError, match="number of a migration"):
        module.record_of_untrusted({**kept(module.Record()), "migration": number})


def test_numbers_differ_and_can_be_told():
    numbers = {outgoing.new_migration() for _ in range(10)}
    assert len(numbers) > 1
    assert all(0 <= number < MIGRATIONS for number in numbers)
