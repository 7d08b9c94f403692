"""A complete parked VM: what it holds, whether it is whole, who has it."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from common.errors import HostError, Unusable
from common.store import (
    checksum,
    description,
    files,
    manifest,
    receiving,
    working_set,
)
from common.store.checksum import Extent, crc32c
from common.store.locked import Directory, flock, open_block
from common.store.manifest import Manifest, ManifestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

RUNNING: Final = "running"
_MAX_MARK: Final = 4096


class Parked:
    """A complete parked VM. Opening checks all but the RAM: see `verify`."""

    def __init__(self, directory: Directory, found: Manifest) -> None:
        self._directory = directory
        self._lock = -1
        self._fds: list[int] = []
        self._state: dict[str, bytes] = {}
        self.path = directory.path
        self.manifest = found

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """HostError names the file and its fault."""
        directory = Directory(Path(path))
        try:
            parked = cls(directory, _read_manifest(directory.path))
        except BaseException:
            directory.close()
            raise
        try:
            for name in parked.manifest.files:
                parked._state[name] = parked._read_state(name)
            for block in parked.manifest.blocks:
                parked._fds.append(open_block(parked.path, block, os.O_RDONLY))
        except BaseException:
            parked.close()
            raise
        return parked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1
        self._directory.close()

    # -- what it holds

    def blocks(self) -> Sequence[int]:
        """Descriptors, read only, of the blocks in their order; they stay ours."""
        return tuple(self._fds)

    @property
    def configuration(self) -> bytes:
        return self._state[manifest.CONFIGURATION]

    @property
    def early(self) -> bytes:
        return self._state[manifest.EARLY_STATE]

    @property
    def device_state(self) -> bytes:
        return self._state[manifest.DEVICE_STATE]

    @property
    def vmdesc(self) -> bytes | None:
        return self._state.get(manifest.VMDESC)

    @property
    def description(self) -> Mapping[str, Any]:
        """What is known of the VM besides its stream; HostError if it is damaged."""
        return description.load(self.path)

    def checksums(self) -> bytes:
        """Of all blocks' regions, block after block: u32 little-endian."""
        return self._state[manifest.CHECKSUMS]

    def verify(self) -> None:
        """Read all RAM; HostError with block and offset of the first fault.

        Looks at the working set and the description, too. Blocks for as long as
        that takes: run it in a thread.
        """
        working_set.load(self.path, self.manifest.blocks)
        description.load(self.path)
        at = 0
        for block, fd in zip(self.manifest.blocks, self._fds, strict=True):
            size = manifest.checksums_size(block.length)
            fault = checksum.find_fault(
                Extent(fd, block.length, block.offset),
                self.checksums()[at : at + size],
            )
            at += size
            if fault:
                raise HostError(
                    f"{self.path / block.file}: RAM block {block.name} is not what it"
                    f" was: {manifest.REGION >> 10} KiB at offset {fault.offset:#x}"
                    f" have the checksum {fault.got:08x} and not"
                    f" {fault.expected:08x}; restore this file from a copy"
                )

    # -- who has it

    def lock(self, *, clone: bool) -> None:
        """Before serving it; HostError if another process moves it, or fills it."""
        self._directory.lock(fcntl.LOCK_SH, "is in use by another process")
        if not clone:
            self._lock_alone()

    def _lock_alone(self) -> None:
        if self._lock >= 0:
            return
        path = self.path / manifest.CONFIGURATION
        with files.named(path, "open"):
            self._lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        flock(
            self._lock,
            fcntl.LOCK_EX,
            self.path,
            "is being served by another process; serve it with --clone, or end that"
            " one",
        )

    @property
    def running(self) -> str | None:
        """Since when and where the VM runs; None: nowhere."""
        path = self.path / RUNNING
        if not path.exists():
            return None
        with files.named(path, "read"), path.open("rb") as file:
            text = file.read(_MAX_MARK).decode(errors="replace").strip()
        # Whatever it says: that it is there is what counts.
        return text if text.isprintable() and text else "elsewhere"

    def mark_running(self, where: str) -> None:
        """The VM runs there from now on; durable when this returns."""
        text = f"since {manifest.now()} at {where}"[:1000]
        files.replace(self.path / RUNNING, text.encode(errors="replace") + b"\n")

    def unmark_running(self) -> None:
        """It does not run there after all; durable when this returns."""
        path = self.path / RUNNING
        with files.named(path, "remove"):
            path.unlink(missing_ok=True)
        files.sync_directory(self.path)

    # -- what an earlier destination asked for

    @property
    def working_set(self) -> Sequence[int]:
        """Pages that were asked for, in that order; none if that is not known."""
        try:
            return working_set.load(self.path, self.manifest.blocks)
        except HostError as error:
            log.warning("%s", error)
            return ()

    def save_working_set(self, pages: Sequence[int]) -> None:
        """Pages as block << 48 | page of the block, for the next serving."""
        working_set.save(self.path, self.manifest.blocks, pages)

    # -- opening

    def _read_state(self, name: str) -> bytes:
        path = self.path / name
        expected = self.manifest.files[name]
        content = files.read(path, expected.size)
        if len(content) != expected.size:
            raise HostError(
                f"{path} is cut off: {len(content)} bytes of {expected.size};"
                " restore it from a copy"
            )
        if crc32c(content) != expected.crc32c:
            raise HostError(f"{path} is not what it was; restore it from a copy")
        return content


def _read_manifest(directory: Path) -> Manifest:
    path = directory / manifest.NAME
    if not path.exists():
        if receiving.is_here(directory):
            raise HostError(
                f"{directory} is incomplete: only a part of the VM arrived; resume that"
                " migration into it, or remove it"
            )
        raise Unusable(f"{directory} is not a parked VM: it has no {manifest.NAME}")
    try:
        return manifest.decode_untrusted(files.read(path, manifest.MAX_SIZE))
    except ManifestError as error:
        raise HostError(f"{path} cannot be used: {error}") from None
