"""The head of an image that `virsh save` wrote: the VM's XML in front of a stream.

All integers are in the byte order of the host that wrote it; it is the one in
which the version is 2 (libvirt, src/qemu/qemu_saveimage.h):

    16 bytes  "LibvirtQemudSave", "LibvirtQemudPart" while it is being written
    u32       version, 2
    u32       bytes between this head and QEMU's stream
    u32       whether the VM ran
    u32       how the stream is compressed, 0: it is not
    u32       where libvirt's cookie begins in these bytes, 0: there is none
    14 x u32  unused
    XML, a zero byte, perhaps the cookie, a zero byte, padding
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import fields

if TYPE_CHECKING:
    from common.stream.fields import Read

MAGIC: Final = b"LibvirtQemudSave"
PARTIAL: Final = b"LibvirtQemudPart"
VERSION: Final = 2
MAX_DATA: Final = 4 << 20  # bytes; what libvirt itself takes is not much longer
HEAD: Final = 16 + 19 * 4

_RAW: Final = 0
_SPARSE: Final = 6  # mapped-ram; libvirt 11.2
_COMPRESSED: Final = {
    1: "gzip -d",
    2: "bzip2 -d",
    3: "xz -d",
    4: "lzop -d",
    5: "zstd -d",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveImage:
    """What the head says."""

    xml: str
    running: bool


def read_untrusted(read: Read) -> SaveImage:
    """Decode all that is in front of the stream; StreamError."""
    magic = fields.take_untrusted(read, len(MAGIC))
    if magic == PARTIAL:
        raise StreamError(
            "libvirt did not finish writing this image; the VM still runs where it was,"
            " save it again"
        )
    if magic != MAGIC:
        raise StreamError("not an image of virsh save", got=magic)
    words = fields.take_untrusted(read, HEAD - len(MAGIC))
    order = _byte_order(words)
    _, size, running, compression, cookie = struct.unpack_from(f"{order}5I", words)
    if compression not in (_RAW, _SPARSE):
        raise StreamError(_compressed(compression), got=compression)
    fields.bounded("the XML of a virsh save image", size, MAX_DATA)
    data = fields.take_untrusted(read, size)
    xml = data[: cookie or None].split(b"\0")[0]
    if not xml.lstrip().startswith(b"<"):
        raise StreamError("the virsh save image has no XML", got=xml[:16])
    return SaveImage(xml=xml.decode(errors="replace"), running=running != 0)


def _byte_order(words: bytes) -> str:
    for order in "<", ">":
        if struct.unpack_from(f"{order}I", words)[0] == VERSION:
            return order
    raise StreamError("a virsh save image of an unknown version", got=words[:4])


def _compressed(compression: int) -> str:
    how = _COMPRESSED.get(compression)
    if how is None:
        return "the virsh save image is compressed in an unknown way"
    return (
        f"the virsh save image is compressed: set save_image_format to raw in libvirt's"
        f" qemu.conf and save again, or unpack what follows its XML with {how}"
    )
