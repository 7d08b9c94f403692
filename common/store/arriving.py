"""A parked VM that has not wholly arrived, but can be served already.

Another process fills the directory by postcopy; all but RAM pages is there.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from common.errors import HostError, StreamError
from common.store import files, manifest, receiving, upstream
from common.store.locked import Directory, open_block
from common.store.manifest import Block, Manifest
from common.store.parked import Parked
from common.store.parking import RECEIVED, kept_path, machine_of
from common.stream import foreign
from common.stream.constants import MAX_PACKAGE
from common.stream.package import split_package_untrusted

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE: Final = "package"
"""Under which the device state is kept as it came."""


class Arriving(Parked):
    """Nothing of it has a checksum yet: those are made when all is here."""

    def __init__(self, directory: Directory, found: Manifest) -> None:
        super().__init__(directory, found)
        self.received = -1
        """The descriptor of the file that says which pages are here."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @staticmethod
    def is_here(path: Path) -> bool:
        """Whether one begins to arrive here that can be served."""
        complete = (path / manifest.NAME).exists()
        return not complete and receiving.is_here(path) and upstream.is_here(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """HostError names the file and its fault; maybe it is complete by now."""
        directory = Directory(Path(path))
        try:
            state = _state(directory.path)
            arriving = cls(directory, _manifest(directory.path, state))
        except BaseException:
            directory.close()
            raise
        arriving._state = state
        try:
            kept = kept_path(directory.path, RECEIVED)
            with files.named(kept, "open"):
                arriving.received = os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
            for block in arriving.manifest.blocks:
                arriving._fds.append(open_block(arriving.path, block, os.O_RDONLY))
        except BaseException:
            arriving.close()
            raise
        return arriving

    def close(self) -> None:
        if self.received >= 0:
            os.close(self.received)
        self.received = -1
        self._socket.close()
        super().close()

    @property
    def socket(self) -> int:
        """The descriptor of a socket to ask for pages from."""
        return self._socket.fileno()

    @property
    def filler(self) -> str:
        """The address of who fills it, if it is there."""
        return upstream.address(self._directory.fd)

    def lock(self, *, clone: bool) -> None:
        """As of a complete one, but for who fills it: that one has the directory."""
        if not clone:
            self._lock_alone()

    @property
    def working_set(self) -> Sequence[int]:
        """Nobody can have been served all of it."""
        return ()


def _state(directory: Path) -> dict[str, bytes]:
    package = kept_path(directory, PACKAGE)
    try:
        found = split_package_untrusted(files.read(package, MAX_PACKAGE))
    except StreamError as error:
        raise HostError(f"{package} is damaged: {error}") from None
    early = directory / manifest.EARLY_STATE
    return {
        manifest.CONFIGURATION: files.read(
            directory / manifest.CONFIGURATION, manifest.MAX_STATE
        ),
        manifest.EARLY_STATE: (
            files.read(early, manifest.MAX_STATE) if early.exists() else b""
        ),
        manifest.DEVICE_STATE: found.sections,
    }


def _manifest(directory: Path, state: dict[str, bytes]) -> Manifest:
    facts = tuple(receiving.recall(directory))
    if not receiving.is_of_this_boot(facts):
        raise HostError(
            f"{directory} is incomplete, and the host was restarted: start dstd with it"
            " first, so that what was lost comes again"
        )
    return Manifest(
        machine=machine_of(state[manifest.CONFIGURATION]),
        blocks=tuple(fact for fact in facts if isinstance(fact, Block)),
        advised=True,  # there is no postcopy without
        run_state=foreign.run_state_untrusted(state[manifest.DEVICE_STATE])
        or "running",
        origin="",
        created=manifest.now(),
        files={},
    )
