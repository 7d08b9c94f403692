"""A whole PC in QEMU, under TCG and without an operating system.

SeaBIOS runs and finds nothing to boot; there are ROMs, device state of every
kind and RAM blocks nobody asked for. `ram` has the main memory only, shared with
the test; with `counting` the CPU runs a program that writes there all the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from support import counting_guest
from support.qemu import Qemu
from support.ram import MIB, PAGE, Block

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

MAIN = "pc.ram"


class Machine(Qemu):
    """`kind` is a machine type, `maximum` what memory may grow to.

    See Qemu for the rest.
    """

    def __init__(
        self,
        kind: str = "pc",
        *,
        memory: int = 64 * MIB,
        version: str = "10",
        incoming: bool = False,
        counting: bool = False,
        options: str = "",
        arguments: Sequence[str] = (),
        page_size: int = PAGE,
        maximum: str = "",
    ) -> None:
        super().__init__(
            Block(MAIN, memory, page_size),
            version=version,
            incoming=incoming,
            arguments=arguments,
        )
        self._kind = f"{kind}{',' if options else ''}{options}"
        self._bios = counting
        self._slots = f",slots=2,maxmem={maximum}" if maximum else ""

    def _machine_arguments(self) -> list[str]:
        (ram,) = self.ram
        path = f"/proc/self/fd/{ram.fd}"
        words = ["-accel", "tcg", "-m", f"{ram.block.size}B{self._slots}"]
        words += ["-M", f"{self._kind},memory-backend={MAIN}"]
        words += ["-object"]
        words += [
            f"memory-backend-file,id={MAIN},size={ram.block.size},"
            f"mem-path={path},share=on"
        ]
        if self._bios:
            words += ["-bios", str(counting_guest.firmware_path())]
        return words


def differences(ram: bytes, path: str | os.PathLike[str]) -> list[int]:
    """Numbers of the pages in which the file is not `ram`."""
    with open(path, "rb") as file:
        other = file.read()
    assert len(other) == len(ram)
    starts = range(0, len(ram), PAGE)
    return [at // PAGE for at in starts if ram[at : at + PAGE] != other[at : at + PAGE]]
