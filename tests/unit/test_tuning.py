"""Processors that stay awake: a request that ends with its descriptor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import tuning


def open_links() -> list[str]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except FileNotFoundError:  # the one that lists the folder
            continue
    return [link for link in found if link == "/dev/cpu_dma_latency"]


@pytest.mark.skipif(
    not os.access("/dev/cpu_dma_latency", os.W_OK), reason="needs root's device"
)
def test_asked_for_as_long_as_needed() -> None:
    with tuning.processors_awake(True):
        assert len(open_links()) == 1
    assert open_links() == []


def test_not_asked_for() -> None:
    with tuning.processors_awake(False):
        assert open_links() == []


def test_no_right_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_LATENCY", "/nowhere/at/all")
    with tuning.processors_awake(True):
        assert open_links() == []
