"""Files that QEMU saves a VM in, and the head that libvirt puts in front of one."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from support.qemu import QemuProcess

XML: Final = "<domain type='qemu'>\n  <name>web1</name>\n</domain>\n"
RAW: Final = 0
SPARSE: Final = 6
_ROUNDED: Final = 65536


def save(qemu: QemuProcess, path: Path, *, mapped: bool = False) -> None:
    """As `migrate` to a file does it."""
    if mapped:
        qemu.set_capabilities("mapped-ram")
    # QEMU 7.2 has no file:.
    qemu.migrate(f"exec:cat > {path}" if qemu.version == "7.2" else f"file:{path}")
    qemu.wait_written()


def virsh_save(
    qemu: QemuProcess, path: Path, *, mapped: bool = False, running: bool = True
) -> None:
    """As `virsh save` does it, which stops the VM first."""
    qemu.execute("stop")
    head = virsh_head(kind=SPARSE if mapped else RAW, running=running)
    path.write_bytes(head)
    if mapped:
        qemu.set_capabilities("mapped-ram")
        qemu.migrate(f"file:{path},offset={len(head)}")
    else:
        qemu.migrate(f"exec:cat >> {path}")
    qemu.wait_written()


def virsh_head(
    *,
    kind: int = RAW,
    running: bool = True,
    magic: bytes = b"LibvirtQemudSave",
    version: int = 2,
    order: str = "<",
    xml: bytes = XML.encode(),
) -> bytes:
    """Head, XML, cookie and padding: the stream begins at a round place."""
    cookie = b"<cookie/>\0"
    begin = 92 + len(xml) + 1
    size = -(-(begin + len(cookie)) // _ROUNDED) * _ROUNDED - 92
    words = (version, size, int(running), kind, len(xml) + 1, *(0,) * 14)
    head = magic + struct.pack(f"{order}19I", *words)
    return (head + xml + b"\0" + cookie).ljust(92 + size, b"\0")
