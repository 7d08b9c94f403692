"""A guest without CPUs whose process, so to speak, keeps what it is given."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from common.guest.parked import ParkedGuest, RamFile

if TYPE_CHECKING:
    from pathlib import Path

    from common.guest.base import GuestState


class KeepingGuest(ParkedGuest):
    """`size` bytes of RAM in `path`; `requests` is what it was asked."""

    def __init__(self, path: Path, size: int, state: GuestState) -> None:
        file = RamFile(idstr="ram", path=str(path), size=size)
        super().__init__("none", (file,), state)
        self.kept: dict[str, int] = {}
        self.requests: list[str] = []

    async def cont(self) -> None:
        self.requests.append("cont")
        await super().cont()

    async def keep(self, name: str, fd: int) -> None:
        await self.forget(name)
        self.kept[name] = os.dup(fd)

    async def forget(self, name: str) -> None:
        if (old := self.kept.pop(name, None)) is not None:
            os.close(old)

    async def quit(self) -> None:
        self.requests.append("quit")

    def close(self) -> None:
        for fd in self.kept.values():
            os.close(fd)
        self.kept.clear()
        super().close()
