"""What one reads of a guest that one knows nothing of: a parked VM on its way in.

The block list tells which blocks there are, and device sections stay bytes. A
few things can be told all the same, because what follows them is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, section

if TYPE_CHECKING:
    from common.stream.fields import Read

_GLOBALSTATE: Final = fields.name(c.GLOBALSTATE_SECTION) + bytes(4) + fields.be32(1)
_BEFORE_NAME: Final = 5  # type byte, be32 section id
_FOOTER_SIZE: Final = 5
GLOBALSTATE_LENGTH: Final = (
    _BEFORE_NAME + len(_GLOBALSTATE) + section.GLOBALSTATE_SIZE + _FOOTER_SIZE
)
_FULL_MOST: Final = _BEFORE_NAME + 1 + c.MAX_NAME + 8


# --- The block list ----------------------------------------------------------


class _Ahead:
    """A `read` of which the next bytes can be looked at."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._seen = b""

    def __call__(self, size: int) -> bytes:
        piece, self._seen = self._seen[:size], self._seen[size:]
        return piece + (self._read(size - len(piece)) if size > len(piece) else b"")

    def look(self, size: int) -> bytes:
        if size > len(self._seen):
            self._seen += self._read(size - len(self._seen))
        return self._seen

    def page_size(self, _: str) -> int:
        """Of a block that was named: the list has it if it is an unusual one.

        What comes next is a be64 page size, the length byte of a name, which is
        not 0, or the be64 behind the last block, which is less than a page.
        """
        if self.look(1)[:1] != b"\0":
            return c.TARGET_PAGE_SIZE
        value = int.from_bytes(self.look(8)[:8], "big")
        if value <= c.TARGET_PAGE_SIZE:
            return c.TARGET_PAGE_SIZE
        if value & (value - 1) or value > c.MAX_RAM_BYTES:
            raise StreamError("a RAM block has pages of an odd size", got=value)
        return value


def read_ram_setup_untrusted(
    read: Read, *, advised: bool
) -> tuple[section.BlockEntry, ...]:
    """The body of RAM's START section; `advised`: an ADVISE came before."""
    ahead = _Ahead(read)
    blocks = section.read_ram_setup_untrusted(
        ahead, page_size_of=ahead.page_size if advised else None
    )
    for block in blocks:
        if block.page_size and block.length % block.page_size:
            raise StreamError(
                f"RAM block {block.idstr} is not made of whole pages", got=block.length
            )
    return blocks


# --- A section in front of the first page ------------------------------------


def end_of_section_untrusted(data: bytes, ram: int) -> int | None:
    """Where the FULL section ends that `data` begins with; None: not known yet.

    Nothing says how long it is. It ends with a footer that has its id, and
    behind that comes RAM's first part or end (`ram` is its id), a command, or
    one more FULL section.
    """
    read = fields.over(data)
    try:
        header = section.read_header_untrusted(read, fields.u8_untrusted(read))
    except StreamError:
        if len(data) < _FULL_MOST:
            return None
        raise
    footer = section.encode_footer(header.section_id)
    at = data.find(footer, read.offset)
    while at >= 0:
        end = at + len(footer)
        if (found := _begins(data[end : end + _FULL_MOST], ram)) is None:
            return None
        if found:
            return end
        at = data.find(footer, at + 1)
    return None


def _begins(data: bytes, ram: int) -> bool | None:
    """Whether something may begin here; None: too little is there to say."""
    if len(data) < _BEFORE_NAME:
        return None
    match data[0]:
        case c.QEMU_VM_SECTION_PART | c.QEMU_VM_SECTION_END:
            return data[1:_BEFORE_NAME] == fields.be32(ram)
        case c.QEMU_VM_COMMAND:
            number = int.from_bytes(data[1:3], "big")
            return c.MIG_CMD_OPEN_RETURN_PATH <= number <= c.MIG_CMD_SWITCHOVER_START
        case c.QEMU_VM_SECTION_FULL:
            return _begins_section(data)
    return False


def _begins_section(data: bytes) -> bool | None:
    name = data[_BEFORE_NAME + 1 :][: data[_BEFORE_NAME]] if data[5:] else b""
    if len(data) <= _BEFORE_NAME or len(name) < data[_BEFORE_NAME]:
        return None
    return bool(name) and name.isascii() and name.decode().isprintable()


# --- The run state -----------------------------------------------------------


def run_state_untrusted(sections: bytes) -> str | None:
    """What the last globalstate section among these says; None: there is none."""
    at = sections.rfind(_GLOBALSTATE)
    while at >= 0:
        begin = at - _BEFORE_NAME
        if begin >= 0 and (state := _globalstate(sections[begin:])):
            return state.run_state
        at = sections.rfind(_GLOBALSTATE, 0, at + len(_GLOBALSTATE) - 1)
    return None


def ends_with_globalstate_untrusted(sections: bytes) -> bool:
    """QEMU's device sections end with it: so these are all, most likely."""
    return _globalstate(sections[-GLOBALSTATE_LENGTH:]) is not None


def _globalstate(sections: bytes) -> section.GlobalState | None:
    """The globalstate section that `sections` begin with, if they do."""
    read = fields.over(sections[:GLOBALSTATE_LENGTH])
    try:
        header = section.read_header_untrusted(read, fields.u8_untrusted(read))
        if not isinstance(header, section.Full):
            return None
        fields.expect("name", c.GLOBALSTATE_SECTION, header.name)
        state = section.read_globalstate_untrusted(read)
        section.read_footer_untrusted(read, header.section_id)
    except StreamError:
        return None
    return state


def ends_with_section_untrusted(sections: bytes) -> bool:
    """Whether the last bytes are the footer of a section that began here."""
    footer = sections[-_FOOTER_SIZE:]
    if len(footer) < _FOOTER_SIZE or footer[0] != c.QEMU_VM_SECTION_FOOTER:
        return False
    return bytes([c.QEMU_VM_SECTION_FULL]) + footer[1:] in sections
