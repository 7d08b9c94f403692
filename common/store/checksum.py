"""CRC32C of stored RAM, one of each region of 64 KiB; see csrc/checksum.h."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from common.native._native import ffi, lib
from common.native.loop import Stop, check, run_loop
from common.store.manifest import CHECKSUM_SIZE, REGION, checksums_size


@dataclass(frozen=True, slots=True)
class Extent:
    """A RAM block in a file: `length` bytes of it, from `start` on."""

    fd: int
    length: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """The region at `offset` of a block is not what it was."""

    offset: int
    expected: int
    got: int


def crc32c(data: bytes) -> int:
    return int(lib.crc32c(0, ffi.from_buffer(data), len(data)))


async def make(extent: Extent) -> bytes:
    """Checksums of all regions: u32 little-endian; a hole is not read.

    HostError if the file cannot be read or is too short.
    """
    values = ffi.new("uint32_t[]", checksums_size(extent.length) // CHECKSUM_SIZE)
    native = _native(extent)
    stop = Stop()
    try:
        await run_loop(lambda: lib.checksum_file(native, values, stop.fd), stop)
    finally:
        stop.close()
    return bytes(ffi.buffer(values))


def find_fault(extent: Extent, expected: bytes) -> Fault | None:
    """The first region that differs from its checksum in `expected`.

    HostError if the file cannot be read or is too short. Blocks for as long as
    reading takes; other threads run meanwhile.
    """
    if len(expected) != checksums_size(extent.length):
        raise ValueError(f"{len(expected)} bytes of checksums for {extent}")
    values = ffi.from_buffer("uint32_t[]", expected)
    result = lib.checksum_verify_file(_native(extent), values, -1)
    if result.kind == lib.RESULT_HOST and result.err == errno.EBADMSG:
        offset = int(result.offset)
        return Fault(offset, int(values[offset // REGION]), int(result.got))
    check(result)
    return None


def _native(extent: Extent) -> object:
    return ffi.new(
        "struct checksum_extent *",
        {"fd": extent.fd, "start": extent.start, "length": extent.length},
    )
