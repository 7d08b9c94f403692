"""A parked VM that is being filled: what a stream brings, until `commit`."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import trio

from common.errors import HostError, StreamError, Unusable
from common.store import (
    checksum,
    description,
    files,
    manifest,
    receiving,
    upstream,
)
from common.store.checksum import Extent, crc32c
from common.store.locked import Directory, open_block
from common.store.manifest import Block, Manifest
from common.store.receiving import Advised
from common.stream import fields, section, vmdesc

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

log = logging.getLogger(__name__)

RECEIVED: Final = "received"
"""Under which it is kept which pages are here: see csrc/arriving.h."""
_KEPT: Final = "kept-"
_KEPT_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,30}", re.ASCII)
# What is made here, and may go again with a VM that came in part.
_OURS: Final = re.compile(
    rf"({'|'.join((*manifest.FILES, manifest.IMAGE, receiving.NAME, upstream.NAME))}"
    rf"|ram-[0-9]+|{_KEPT}.*|{re.escape(manifest.NAME)}(\.new)?)",
    re.ASCII,
)


class Parking:
    """A directory that becomes a parked VM with `commit`.

    Use `create` or `reopen`. The descriptors of the blocks are this object's.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.path = directory.path
        self.configuration = b""
        self.early = b""
        self.advised = False
        self.blocks: list[Block] = []
        self.fds: list[int] = []
        self._made = False  # the directory itself
        self._describes = False
        self._unwritten = b""  # checksums of pages that the disk did not take

    @classmethod
    def create(cls, path: str | Path, *, anew: bool = False) -> Self:
        """A new directory, or one that is empty; HostError for any other.

        It may be described already. `anew`: or one in which a process before this
        one had begun, if nobody can need what came.
        """
        path = Path(path)
        made = False
        with files.named(path, "create"), suppress(FileExistsError):
            os.mkdir(path, 0o700)
            made = True
        directory = Directory(path)
        try:
            directory.lock(fcntl.LOCK_EX, "is in use by another process")
            if anew and receiving.is_here(path) and not cls.is_left(path):
                _refuse_complete(path)
                _clear(path)
            _check_empty(path)
            receiving.begin(path)
        except BaseException:
            directory.close()
            raise
        parking = cls(directory)
        parking._made = made
        return parking

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """An incomplete one as it was left, its blocks open; HostError."""
        directory = Directory(Path(path))
        parking = cls(directory)
        try:
            directory.lock(fcntl.LOCK_EX, "is in use by another process")
            parking._recall()
        except BaseException:
            parking.close()
            raise
        return parking

    @staticmethod
    def is_left(path: str | Path) -> bool:
        """Whether a process before this one has left an incomplete one and a record."""
        path = Path(path)
        return receiving.is_here(path) and any(path.glob(f"{_KEPT}*"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._close_blocks()
        self._directory.close()

    def _close_blocks(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def discard(self) -> None:
        """Leave the place as it was before `create`; what came is lost."""
        self._close_blocks()  # without them there are descriptors left for this
        _clear(self.path)
        with files.named(self.path, "remove"):
            if self._describes:
                os.unlink(self.path / description.NAME)
            if self._made:
                with suppress(OSError):  # somebody else has put something there
                    os.rmdir(self.path)

    # -- what the stream brings, in its order

    def set_configuration(self, content: bytes, *, advised: bool = False) -> None:
        """The bytes behind the file header; was there an ADVISE behind them?"""
        files.write(self.path / manifest.CONFIGURATION, content, durable=True)
        receiving.note(self.path, Advised(advised))
        self.configuration, self.advised = content, advised

    def set_early(self, content: bytes) -> None:
        """The sections between the start of RAM and its first part."""
        files.write(self.path / manifest.EARLY_STATE, content, durable=True)
        self.early = content

    def set_description(self, content: Mapping[str, Any]) -> None:
        """What is known of the VM besides its stream, for people."""
        self._describes |= not (self.path / description.NAME).exists()
        description.update(self.path, content)

    def add_block(self, name: str, length: int, page_size: int) -> int:
        """The next RAM block of the stream: a file of zeroes to write to."""
        file = manifest.block_file(len(self.blocks))
        block = Block(name=name, length=length, page_size=page_size, file=file)
        fd = files.create_sparse(self.path / file, length)
        self._adopt(block, fd)
        return fd

    def add_block_in_place(self, block: Block) -> int:
        """A RAM block that is in the file `image` already; read only."""
        path = self.path / block.file
        with files.named(path, "open"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._adopt(block, fd)
        return fd

    def _adopt(self, block: Block, fd: int) -> None:
        self.fds.append(fd)
        self.blocks.append(block)
        receiving.note(self.path, block)

    # -- what a process after this one needs

    @property
    def kept(self) -> Mapping[str, int]:
        """Lengths of the files that were kept here, by name; of a process before."""
        with files.named(self.path, "read"):
            return {
                entry.name.removeprefix(_KEPT): entry.stat().st_size
                for entry in os.scandir(self.path)
                if entry.name.startswith(_KEPT)
            }

    def keep(self, name: str, length: int) -> int:
        """A file of zeroes that is there until `commit`; the caller's descriptor.

        It replaces one of that name, which stays as it is for who has it open. Its
        room is its own: a disk that is full later does not matter.
        """
        path = self._kept_path(name)
        with files.named(path, "create"), suppress(FileNotFoundError):
            path.unlink()
        return files.create_solid(path, length)

    def secure(self, name: str, fd: int) -> None:
        """Make durable what was kept under `name`, and all that it relies on.

        What it does not rely on are pages: should the host go down, they come again.
        """
        files.sync_open(fd, self._kept_path(name))
        files.sync(self.path / receiving.NAME)
        files.sync_directory(self.path)
        files.sync_directory(self.path.absolute().parent)

    def open_kept(self, name: str) -> int:
        """One that a process before this one kept; the caller's descriptor."""
        path = self._kept_path(name)
        with files.named(path, "open"):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def forget(self, name: str) -> None:
        path = self._kept_path(name)
        with files.named(path, "remove"), suppress(FileNotFoundError):
            path.unlink()

    def _kept_path(self, name: str) -> Path:
        return kept_path(self.path, name)

    def upstream(self) -> AbstractContextManager[int]:
        """From now on it can be served: a socket at which pages are asked for."""
        return upstream.listening(self.path)

    # -- the end

    async def commit(
        self, device_state: bytes, text: bytes | None, run_state: str, origin: str
    ) -> None:
        """All has come: make it durable, then make it a parked VM.

        `text` is the stream's description, where there was one. HostError leaves
        it incomplete, and may be tried again.
        """
        devices = _devices(text)
        sums = b"".join([await checksum.make(extent) for extent in self._extents()])
        if self._unwritten:
            await trio.to_thread.run_sync(self._write_again, sums)
        state = {
            manifest.CONFIGURATION: self.configuration,
            manifest.EARLY_STATE: self.early,
            manifest.DEVICE_STATE: device_state,
            manifest.CHECKSUMS: sums,
        }
        if text is not None:
            state[manifest.VMDESC] = text
        whole = Manifest(
            machine=machine_of(self.configuration),
            blocks=tuple(self.blocks),
            advised=self.advised,
            run_state=run_state,
            origin=origin[: manifest.MAX_TEXT],
            created=manifest.now(),
            devices=devices,
            files={
                name: manifest.File(len(content), crc32c(content))
                for name, content in state.items()
            },
        )
        await trio.to_thread.run_sync(self._finish, whole, state)

    def _sync_pages(self, sums: bytes) -> None:
        try:
            for block, fd in zip(self.blocks, self.fds, strict=True):
                files.sync_open(fd, self.path / block.file)
        except HostError:
            self._unwritten = sums
            # Should we die before they are written, they have to come again.
            with suppress(HostError):
                receiving.note(self.path, receiving.Boot("the disk failed in it"))
            raise

    def _write_again(self, sums: bytes) -> None:
        """Once the kernel has said that it could not write pages, it takes them for
        written. They are in memory still, or what is read there is something else.
        """
        if sums != self._unwritten:
            raise HostError(
                f"{self.path}: pages were lost that the disk did not take. If they"
                " came by postcopy, end this daemon, start it again, and recover: then"
                " all of them come again"
            )
        for block, fd in zip(self.blocks, self.fds, strict=True):
            if block.file != manifest.IMAGE:
                files.write_again(fd, self.path / block.file)

    def _extents(self) -> Iterator[Extent]:
        for block, fd in zip(self.blocks, self.fds, strict=True):
            yield Extent(fd, block.length, block.offset)

    def _finish(self, whole: Manifest, state: Mapping[str, bytes]) -> None:
        for name, content in state.items():
            files.write(self.path / name, content, durable=True)
        self._sync_pages(state[manifest.CHECKSUMS])
        files.sync_directory(self.path)
        files.sync_directory(self.path.absolute().parent)
        path = self.path / manifest.NAME
        try:
            files.replace(path, manifest.encode(whole))
        except HostError:
            # It may have its name already, and not for certain on the disk.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        # It is complete; what only receiving needed does no harm if it stays.
        with suppress(HostError, OSError):
            for name in self.kept:
                self.forget(name)
            (self.path / receiving.NAME).unlink()
            (self.path / upstream.NAME).unlink(missing_ok=True)

    # -- what has come so far

    def _recall(self) -> None:
        _refuse_complete(self.path)
        if not receiving.is_here(self.path):
            raise HostError(f"{self.path} is not a parked VM, not even a part of one")
        facts = tuple(receiving.recall(self.path))
        self.blocks = [fact for fact in facts if isinstance(fact, Block)]
        for fact in facts:
            if isinstance(fact, Advised):
                self.advised = fact.advised
        if not receiving.is_of_this_boot(facts):
            self._forget_pages()
        for block in self.blocks:
            self.fds.append(open_block(self.path, block, os.O_RDWR))
        self.configuration = self._recalled(manifest.CONFIGURATION)
        self.early = self._recalled(manifest.EARLY_STATE)

    def _forget_pages(self) -> None:
        """The host went down meanwhile, and nobody knows which of them it wrote."""
        log.warning(
            "%s: the host was restarted; all pages have to come again", self.path
        )
        self.forget(RECEIVED)
        for block in self.blocks:
            path = self.path / block.file
            with files.named(path, "empty"):
                path.unlink(missing_ok=True)
            os.close(files.create_sparse(path, block.length))
        receiving.note(self.path, receiving.this_boot())

    def _recalled(self, name: str) -> bytes:
        path = self.path / name
        return files.read(path, manifest.MAX_STATE) if path.exists() else b""


def kept_path(directory: Path, name: str) -> Path:
    """Where a file is kept until it is complete."""
    if not _KEPT_NAME.fullmatch(name):
        raise ValueError(f"not a name to keep a file under: {name!r}")
    return directory / (_KEPT + name)


def _clear(path: Path) -> None:
    """Remove what may be ours; first what makes it a VM, and that for certain.

    Then what would be gone on with, and last what says that the rest may go.
    """
    with files.named(path, "remove"):
        (path / manifest.NAME).unlink(missing_ok=True)
        files.sync_directory(path)
        ours = filter(_OURS.fullmatch, os.listdir(path))
        for name in sorted(ours, key=_turn):
            os.unlink(path / name)


def _turn(name: str) -> tuple[bool, bool]:
    return name == receiving.NAME, not name.startswith(_KEPT)


def _check_empty(path: Path) -> None:
    _refuse_complete(path)
    if receiving.is_here(path):
        raise Unusable(
            f"{path} holds a VM of which only a part arrived; resume that migration,"
            " or remove the directory"
        )
    with files.named(path, "read"):
        names = sorted({*os.listdir(path)} - {description.NAME})
    if names:
        raise Unusable(
            f"{path} is not empty: it holds {names[0]}; name a new directory"
        )


def _refuse_complete(path: Path) -> None:
    if (path / manifest.NAME).exists():
        raise Unusable(
            f"{path} holds a parked VM already, and a complete one: serve it, or name a"
            " new directory"
        )


def _devices(text: bytes | None) -> tuple[str, ...]:
    if text is None:
        return ()
    try:
        return tuple(one.name for one in vmdesc.lengths_untrusted(text))
    except StreamError:
        return ()  # it is kept for analysers; nothing here depends on it


def machine_of(configuration: bytes) -> str:
    """Its name in the bytes that were kept of a stream."""
    read = fields.over(configuration + section.EOF)
    found, _ = section.read_configuration_untrusted(read)
    return found.machine
