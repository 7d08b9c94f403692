"""The package: all device state in one piece, between LISTEN and RUN.

Sections have no length, but the package has one, and the commands at its two
ends can be told apart from device state: five bytes from the end a section's
footer has 0x7e where a PING has the low byte of its length, 4, and RUN the
command byte, 8. So the state inside can be carried by one who cannot read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from common.errors import StreamError
from common.stream import command, fields
from common.stream import constants as c

_LISTEN: Final = command.encode(command.Listen())
_RUN: Final = command.encode(command.Run())
_PING: Final = command.encode(command.Ping(0))[:-4]
_PING_SIZE: Final = len(_PING) + 4
_FOOTER_SIZE: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package taken apart; `sections` are whole sections, one after another.

    `pings` are the values to be answered after the sections have been loaded
    and before RUN. QEMU accepts LISTEN and RUN outside of a package as well.
    """

    sections: bytes
    pings: tuple[int, ...] = (c.PING_LOADED,)
    listen: bool = True
    run: bool = True


def encode_package(package: Package) -> bytes:
    """The bytes behind the command PACKAGED, which carries their number."""
    return b"".join(
        (
            _LISTEN if package.listen else b"",
            package.sections,
            *(command.encode(command.Ping(value)) for value in package.pings),
            _RUN if package.run else b"",
        )
    )


def split_package_untrusted(blob: bytes) -> Package:
    """Take a package apart from both ends; what is between stays bytes.

    Raises StreamError unless that is nothing, or begins like a section and ends
    with a footer.
    """
    listen = blob.startswith(_LISTEN)
    begin = len(_LISTEN) if listen else 0
    run = blob.endswith(_RUN) and len(blob) >= begin + len(_RUN)
    end = len(blob) - (len(_RUN) if run else 0)
    pings: list[int] = []
    while end - begin >= _PING_SIZE and blob.startswith(_PING, end - _PING_SIZE):
        fields.bounded("number of pings in a package", len(pings) + 1, c.MAX_PINGS)
        pings.append(int.from_bytes(blob[end - 4 : end], "big"))
        end -= _PING_SIZE
    sections = blob[begin:end]
    if sections:
        _check_ends_untrusted(sections)
    return Package(
        sections=sections, pings=tuple(reversed(pings)), listen=listen, run=run
    )


def _check_ends_untrusted(sections: bytes) -> None:
    if not c.QEMU_VM_SECTION_START <= sections[0] <= c.QEMU_VM_SECTION_FULL:
        raise StreamError("a package does not begin with a section", got=sections[:1])
    if sections[-_FOOTER_SIZE:][0] != c.QEMU_VM_SECTION_FOOTER:
        raise StreamError(
            "a package does not end with a section's footer", got=sections[-5:]
        )
