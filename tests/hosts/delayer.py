"""Carries packets between the switch `wire` and the cable `to-destination`.

    python delayer.py MILLISECONDS LOSS_PERCENT

There are kernels without netem. Two TAP devices, and a program that keeps every
packet for so long and loses some; TCP sees a true round trip and true loss.
Prints "ready", and ends by being killed; the kernel removes the devices then.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x1002
PACKET = 65536
SEED = 1


def tap(name: str, bridge: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI)
    fcntl.ioctl(fd, TUNSETIFF, request)
    ip("link", "set", name, "master", bridge, "up")
    return fd


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def carry(ends: tuple[int, int], seconds: float, loss: float) -> None:
    chance = random.Random(SEED)
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        left = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        readable, _, _ = select.select(ends, [], [], left)
        now = time.monotonic()
        for end in readable:
            packet = os.read(end, PACKET)
            if chance.random() >= loss:
                waiting.append((now + seconds, ends[1 - ends.index(end)], packet))
        while waiting and waiting[0][0] <= now:
            _, other, packet = waiting.popleft()
            os.write(other, packet)


def main() -> None:
    milliseconds, percent = map(float, sys.argv[1:])
    ip("link", "add", "far", "type", "bridge")
    ip("link", "set", "far", "up")
    ip("link", "set", "to-destination", "master", "far")
    ends = tap("tap-near", "wire"), tap("tap-far", "far")
    print("ready", flush=True)
    carry(ends, milliseconds / 1000, percent / 100)


if __name__ == "__main__":
    main()
