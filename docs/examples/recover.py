"""Recovers a paused postcopy with qemu.qmp; see docs/recovery.md.

    recover.py SOURCE DESTINATION URI

SOURCE and DESTINATION are control sockets, of a daemon or of QEMU. URI is where the
destination listens and the source connects: tcp:10.0.0.2:4444. Exit status: 0 it goes
on, 1 it cannot be recovered, 2 usage, 3 still paused.
"""

from __future__ import annotations

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient

PATIENCE = 30.0  # seconds
LOOK = 0.1
AGAIN = 1.0
TIMES = 5
PAUSED = "postcopy-paused"
ACTIVE = "postcopy-active"
LOST = ("failed", "cancelled", "none")


class Over(Exception):
    """The end of it: what to say, and the exit status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def statuses(source: QMPClient, destination: QMPClient) -> tuple[str, str]:
    """How both ends see it; Over if that is the end."""
    src, dst = [
        (await end.execute("query-migrate")).get("status", "none")
        for end in (source, destination)
    ]
    if src == "completed":
        raise Over(0, "the migration is completed")
    if src in LOST or dst in (*LOST, "setup"):
        raise Over(1, f"it cannot be recovered: source {src}, destination {dst}")
    return src, dst


async def order(end: QMPClient, command: str, **arguments: object) -> bool:
    """Out of band, where QEMU takes it at any time; a refusal is told, and False."""
    print(f"{end.name}: {command} {arguments}")
    oob = command in ("migrate-pause", "migrate-recover")
    try:
        await end.execute(command, arguments, oob=oob)
    except ExecuteError as error:
        print(f"{end.name}: {error}")
        return False
    return True


async def both_are(wanted: str, source: QMPClient, destination: QMPClient) -> str:
    """Wait for it. The destination's status: with all pages it is completed."""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                src, dst = await statuses(source, destination)
                if src == wanted and dst in (wanted, "completed"):
                    return dst
                await asyncio.sleep(LOOK)
    except TimeoutError:
        raise Over(3, f"not {wanted}: source {src}, destination {dst}") from None


async def listen(source: QMPClient, destination: QMPClient, uri: str) -> None:
    """A QEMU refuses it while it has not closed its old listener yet."""
    for _ in range(TIMES):
        if await order(destination, "migrate-recover", uri=uri):
            return
        await asyncio.sleep(AGAIN)
        if (await statuses(source, destination))[1] != PAUSED:
            return


async def recover(source: QMPClient, destination: QMPClient, uri: str) -> None:
    src, dst = await statuses(source, destination)
    print(f"source: {src}, destination: {dst}")
    if (src, dst) == (ACTIVE, ACTIVE):
        return
    # One may not have noticed that the connection is gone.
    if src != PAUSED:
        await order(source, "migrate-pause")
    if dst not in (PAUSED, "completed"):
        await order(destination, "migrate-pause")
    if await both_are(PAUSED, source, destination) == PAUSED:
        await listen(source, destination, uri)
    await order(source, "migrate", uri=uri, resume=True)
    await both_are(ACTIVE, source, destination)


async def main(source_path: str, destination_path: str, uri: str) -> int:
    source, destination = QMPClient("source"), QMPClient("destination")
    try:
        await source.connect(source_path)
        await destination.connect(destination_path)
        await recover(source, destination, uri)
    except Over as over:
        print(over)
        return over.status
    finally:
        await source.disconnect()
        await destination.disconnect()
    print("postcopy goes on")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        print(f"usage: {sys.argv[0]} SOURCE DESTINATION URI", file=sys.stderr)
        sys.exit(2)
    sys.exit(asyncio.run(main(*sys.argv[1:])))
