"""Attach messages that a guest's process may send, for tests and the fuzzer."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20

BLOCK: dict[str, Any] = {
    "idstr": "ram",
    "length": 64 * MIB,
    "page-size": 4096,
    "base": 0x7F0000000000,
    "guest-address": 0,
}
ATTACH: dict[str, Any] = {
    "version": 1,
    "machine": "postcopyd-1",
    "device": {"name": "microvm", "version": 1},
    "state": "running",
    "pid": 4711,
    "vcpus": [4712, 4713],
    "blocks": [BLOCK],
    "descriptors": ["userfaultfd", "pagemap", "block:ram"],
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A good packet and how many descriptors come with it."""

    name: str
    packet: bytes
    descriptors: int


def changed(path: str, value: object) -> dict[str, Any]:
    """ATTACH with the member at `path` ("blocks.0.length") set to `value`."""
    whole = copy.deepcopy(ATTACH)
    *parents, last = path.split(".")
    place: Any = whole
    for step in parents:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return whole


def packed(message: object) -> bytes:
    return json.dumps(message).encode()


SAMPLES = (
    Sample("attach", packed({"attach": ATTACH}), 3),
    Sample(
        "attach again",
        packed(
            {"attach": changed("descriptors", [*ATTACH["descriptors"], "keep:note"])}
        ),
        4,
    ),
    Sample(
        "attach without userfaultfd",
        packed(
            {
                "attach": changed("descriptors", ["pagemap", "block:ram"])
                | {"no-userfaultfd": "set vm.unprivileged_userfaultfd=1"}
            }
        ),
        2,
    ),
    Sample("return", packed({"return": {}, "id": 1}), 0),
    Sample(
        "saved",
        packed({"return": {"length": 4096}, "id": 2, "descriptors": ["state"]}),
        1,
    ),
    Sample("error", packed({"error": "the guest is running", "id": 3}), 0),
    Sample("event", packed({"event": "shutdown", "data": {"reason": "it ended"}}), 0),
)
