"""The line that a service manager shows."""

from __future__ import annotations

import pytest

from common.progress import progress_line

MIB = 1 << 20


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ({}, "no migration; the guest is running"),
        (
            {
                "status": "active",
                "ram": {
                    "total": 100 * MIB,
                    "remaining": 25 * MIB,
                    "transferred": 80 * MIB,
                    "dirty-sync-count": 2,
                },
            },
            "active: 75 % of 100 MiB, pass 2, 80 MiB sent, 25 MiB left;"
            " the guest is running",
        ),
        (
            {"status": "failed", "error-desc": "no route to host"},
            "failed: no route to host; the guest is running",
        ),
        (
            {
                "status": "setup",
                "socket-address": [
                    {"type": "inet", "host": "::", "port": "4444"},
                    {"type": "unix", "path": "/x"},
                ],
                "x-postcopyd": {"precopy-pages": 0, "postcopy-pages": 0},
            },
            "setup: waiting at :::4444, waiting at /x; the guest is running",
        ),
        (
            {
                "status": "postcopy-active",
                "x-postcopyd": {
                    "precopy-pages": 256,
                    "postcopy-pages": 256,
                    "faults": 7,
                },
            },
            "postcopy-active: 2 MiB received, 7 faults; the guest is running",
        ),
    ],
)
def test_lines(reply: dict[str, object], line: str) -> None:
    assert progress_line(reply, "running") == line
