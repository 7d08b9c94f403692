"""RAM sections of a stream in a file: with pages, and those of mapped-ram."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from common.channel import Channel
from common.errors import ChannelLost, StreamError
from common.guest.base import RamBlock
from common.native._native import ffi, lib
from common.native.loop import check, run_loop
from common.native.ram import Ram
from common.stream import constants as c
from common.stream import fields, ram, section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.store.manifest import Block
    from common.store.reading import FileReader


class RamSections(Protocol):
    """What reads RAM's parts from a file, as many as follow each other."""

    @property
    def begun(self) -> bool:
        """One has been read."""

    async def load(self) -> None:
        """The file stands behind them afterwards: StreamError, ChannelLost."""

    def close(self) -> None: ...


class PlainRam:
    """Parts with pages: the C loader puts them into the files of the blocks."""

    def __init__(
        self, file: FileReader, section_id: int, blocks: Sequence[tuple[Block, int]]
    ) -> None:
        self._file = file
        self._destination = ffi.new("struct destination *")
        self._loader = ffi.new("struct loader *")
        with ExitStack() as stack:
            # Opened anew: a position of its own.
            fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
            self._channel = Channel(fd, "file")
            stack.callback(self._channel.close)
            table = Ram([_ram_block(block, ram_fd) for block, ram_fd in blocks])
            stack.callback(table.close)
            self._open(table, stack)
            self._loader.section_id = section_id
            self._stack = stack.pop_all()

    def _open(self, table: Ram, stack: ExitStack) -> None:
        check(lib.ram_prepare_destination(table.native, -1))
        way = int(lib.PLACE_FILE)
        check(
            lib.destination_open(self._destination, table.native, way, -1, ffi.NULL, 0)
        )
        stack.callback(lib.destination_close, self._destination)
        channel = self._channel.native
        check(lib.loader_open(self._loader, self._destination, channel, False))
        stack.callback(lib.loader_close, self._loader)

    def close(self) -> None:
        self._stack.close()

    @property
    def begun(self) -> bool:
        return bool(self._loader.begun)

    async def load(self) -> None:
        channel = self._channel.native
        lib.channel_skip(channel)
        os.lseek(self._channel.fd, self._file.offset, os.SEEK_SET)
        begin = self._file.offset - int(lib.channel_position(channel))
        try:
            await run_loop(lambda: lib.load_main(self._loader), self._channel.stop)
        except StreamError as error:
            error.offset = begin + (error.offset or 0)
            raise
        except ChannelLost as error:
            # The end of a file is where its last record began, not an errno.
            self._file.seek(begin + int(lib.channel_position(channel)))
            raise ChannelLost(error.message) from None
        self._file.seek(begin + int(lib.channel_position(channel)))


class MappedRam:
    """Parts without pages: these are elsewhere in the file."""

    def __init__(self, file: FileReader, section_id: int) -> None:
        self._file = file
        self._section_id = section_id
        self.begun = False

    def close(self) -> None:
        """There is nothing to close."""

    async def load(self) -> None:
        while self._file.look(1) in _PARTS:
            self._part_untrusted()
            self.begun = True

    def _part_untrusted(self) -> None:
        read = self._file
        header = section.read_header_untrusted(read, fields.u8_untrusted(read))
        fields.expect("section id", self._section_id, header.section_id)
        while (record := ram.read_untrusted(read)) != ram.Eos():
            if not isinstance(record, ram.MultifdFlush):
                raise StreamError("a page within the stream of a mapped-ram file")
        section.read_footer_untrusted(read, self._section_id)


_PARTS = (bytes([c.QEMU_VM_SECTION_PART]), bytes([c.QEMU_VM_SECTION_END]))


def _ram_block(block: Block, fd: int) -> RamBlock:
    return RamBlock(
        idstr=block.name,
        length=block.length,
        page_size=c.TARGET_PAGE_SIZE,
        base=0,
        guest_address=0,
        fd=fd,
    )
