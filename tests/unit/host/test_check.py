"""What each need finds, on this machine and with demands it cannot fulfil."""

from __future__ import annotations

import dataclasses
import resource
from typing import TYPE_CHECKING

import pytest

import dstd.cli
import srcd.cli
from common.host import check
from common.host.check import Finding, Level

if TYPE_CHECKING:
    from common.config import ServeConfig

QMP = ["serve", "--qmp", "q"]


def found(config: ServeConfig | None, need: str, *, incoming: bool) -> Finding:
    findings = check.look(config, incoming=incoming)
    (one,) = [finding for finding in findings if finding.need == need]
    return one


def test_every_need_has_a_line() -> None:
    source = {one.need for one in check.look(None, incoming=False)}
    destination = {one.need for one in check.look(None, incoming=True)}
    both = {
        *("userfaultfd", "/dev/kvm", "memory", "pool of huge pages"),
        *("descriptors", "processors stay awake"),
    }
    assert both <= source
    assert both <= destination
    assert "congestion control" in source
    assert "huge pages on request (MADV_COLLAPSE)" in destination


@pytest.mark.userfaultfd
def test_abilities_have_a_line() -> None:
    source = {one.need for one in check.look(None, incoming=False)}
    destination = {one.need for one in check.look(None, incoming=True)}
    assert "dirty tracking (WP_ASYNC)" in source
    assert "dirty tracking (PAGEMAP_SCAN)" in source
    assert {"pages in place (MINOR)", "blocktime (THREAD_ID)"} <= destination


def test_what_is_wrong_has_a_way_out() -> None:
    for incoming in (False, True):
        for one in check.look(None, incoming=incoming):
            assert (one.level is Level.OK) == (not one.fix), one


def test_a_guest_that_does_not_fit() -> None:
    config = dstd.cli.parse([*QMP, "--memory", "1000000G"])
    one = found(config, "memory", incoming=True)
    assert one.level is Level.FAIL
    assert "the guest has 1024000000 MiB" in one.says
    willing = dataclasses.replace(config, overcommit=True)
    assert found(willing, "memory", incoming=True).level is Level.WARN


def test_a_pool_too_small() -> None:
    config = dstd.cli.parse([*QMP, "--memory", "1000000G", "--hugepages", "2M"])
    one = found(config, "pool of huge pages", incoming=True)
    assert one.level is Level.FAIL
    assert one.fix.startswith("sysctl vm.nr_hugepages=512000000,")
    assert found(config, "memory", incoming=True).level is Level.OK


def test_an_unknown_congestion_control() -> None:
    config = srcd.cli.parse([*QMP, "--memory", "8M", "--congestion", "xyzzy"])
    one = found(config, "congestion control", incoming=False)
    assert one.level is Level.FAIL
    assert "xyzzy is not among" in one.says


def test_few_descriptors() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        one = found(None, "descriptors", incoming=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (one.level, one.says) == (Level.WARN, "up to 200 at a time")


def test_let_sleep_needs_nothing() -> None:
    config = srcd.cli.parse([*QMP, "--memory", "8M", "--let-sleep"])
    assert found(config, "processors stay awake", incoming=False).level is Level.OK


def test_a_line() -> None:
    fixed = Finding(Level.FAIL, "thing", "is not there", "get one")
    assert str(fixed) == "FAIL  thing: is not there; get one"
    assert str(Finding(Level.OK, "thing", "there")) == "OK    thing: there"
