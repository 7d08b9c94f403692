"""Builds the initramfs of the Linux guest; run by `.ci/linux`.

    linux_image.py PACKAGES FOLDER

takes the kernel and busybox from PACKAGES, where Debian's packages have been
unpacked, and the checker from FOLDER, and puts `vmlinuz` and `initramfs` there.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

HERE = Path(__file__).parent / "linux"

DRIVERS = ("virtio_pci", "virtio_blk", "virtio_net")
APPLETS = ("sh", "mount", "insmod", "ip", "ping")


class Cpio:
    """An archive in the format that the kernel takes ("newc")."""

    def __init__(self) -> None:
        self._members = bytearray()
        self._number = 0

    def directory(self, name: str) -> None:
        self._member(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes) -> None:
        self._member(name, stat.S_IFREG | 0o755, data)

    def link(self, name: str, target: str) -> None:
        self._member(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self, name: str) -> None:
        """The device that the first process gets as its input and output."""
        self._member(name, stat.S_IFCHR | 0o600, device=(5, 1))

    def finish(self) -> bytes:
        self._member("TRAILER!!!", 0)
        return bytes(self._members)

    def _member(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._number += 1
        path = name.encode() + b"\0"
        fields = (
            *(self._number, mode, 0, 0, 1, 0, len(data), 0, 0),
            *device,
            *(len(path), 0),
        )
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (header + path, data):
            self._members += part + bytes(-len(part) % 4)


def initramfs(packages: Path, checker: bytes) -> bytes:
    archive = Cpio()
    for name in ("dev", "proc", "bin", "modules"):
        archive.directory(name)
    archive.console("dev/console")
    archive.file("bin/busybox", (packages / "bin" / "busybox").read_bytes())
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    archive.file("bin/checker", checker)
    for number, module in enumerate(modules(packages)):
        archive.file(f"modules/{number:02}-{module.stem}", module.read_bytes())
    archive.file("init", (HERE / "init").read_bytes())
    return archive.finish()


def modules(packages: Path) -> list[Path]:
    """The drivers and what they need, in the order of loading."""
    files = {
        path.stem.replace("-", "_"): path
        for path in (packages / "lib" / "modules").rglob("*.ko")
    }
    ordered: list[str] = []

    def add(name: str) -> None:
        for needed in needs(files[name]):
            add(needed)
        if name not in ordered:
            ordered.append(name)

    for name in DRIVERS:
        add(name)
    return [files[name] for name in ordered]


def needs(module: Path) -> list[str]:
    """What a module says of itself."""
    found = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    return found[1].decode().replace("-", "_").split(",") if found and found[1] else []


def kernel(packages: Path) -> Path:
    (path,) = (packages / "boot").glob("vmlinuz-*")
    return path


def main(packages: Path, folder: Path) -> None:
    made = folder / "initramfs.new"
    made.write_bytes(initramfs(packages, (folder / "checker").read_bytes()))
    shutil.copyfile(kernel(packages), folder / "vmlinuz")
    os.replace(made, folder / "initramfs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
