"""Device sections that nobody here can read: where they end.

A FULL section has no length. The description behind EOF has all of them, and
comes last, so everything behind RAM is kept until it fits together. That is
also the only sign that it is complete: the source says nothing more and waits
for SHUT.

A source that sends no description (machine property suppress-vmdesc) is done
when it closes, or, if it waits for SHUT, when what looks like the end is
followed by silence.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, foreign, section, vmdesc

if TYPE_CHECKING:
    from common.channel import Channel

MAX_ENDING: Final = c.MAX_PACKAGE + c.MAX_VMDESC  # bytes
MAX_EARLY: Final = 512 << 10  # bytes, less than a channel buffers
# What a JSON object ends with; srcd may add spaces. Anywhere else it is not
# worth a pass over all that was kept.
_LAST_OF_DESCRIPTION: Final = (b"}", b" ")
# A description follows EOF at once, unless the network holds it up.
SILENCE_SECONDS: Final = 3.0


async def receive_ending_untrusted(
    channel: Channel, begun: bytes, early: bytes = b""
) -> vmdesc.Ending:
    """The rest of the stream, taken apart; `begun` was read of it already.

    `early` as in `vmdesc.split_ending_untrusted`. StreamError if the channel ends,
    or MAX_ENDING is reached, before it is complete.
    """
    kept = bytearray(begun)
    while more := await _read(channel, kept):
        kept += more
        fields.bounded("end of the stream", len(kept), MAX_ENDING)
        if kept.endswith(_LAST_OF_DESCRIPTION):
            ending = vmdesc.split_ending_untrusted(bytes(kept), early)
            if ending is not None:
                return ending
    sections = bytes(kept.removesuffix(section.EOF))
    if len(sections) < len(kept) and foreign.ends_with_section_untrusted(sections):
        return vmdesc.Ending((), None, sections)
    raise StreamError(
        "the stream ends without the description that tells how long its device"
        " sections are"
    )


async def _read(channel: Channel, kept: bytearray) -> bytes:
    """What comes next; nothing if that was all."""
    begin = -foreign.GLOBALSTATE_LENGTH - len(section.EOF)
    last = bytes(kept[begin:])
    if not (
        last.endswith(section.EOF)
        and foreign.ends_with_globalstate_untrusted(last.removesuffix(section.EOF))
    ):
        return await channel.read_some()
    with trio.move_on_after(SILENCE_SECONDS):
        return await channel.read_some()
    channel.stop.clear()
    return b""


async def receive_early_untrusted(channel: Channel, begun: bytes, ram: int) -> bytes:
    """A FULL section in front of RAM's first part, and nothing of what follows.

    `begun` was read of it already; `ram` is the id of RAM's section. StreamError
    if it does not end within MAX_EARLY bytes.
    """
    ahead = b""
    while True:
        ahead = await channel.look(len(ahead) + 1)
        end = foreign.end_of_section_untrusted(begun + ahead, ram)
        if end is not None:
            return begun + await channel.decode(partial(_take, end - len(begun)))
        fields.bounded("device state in front of RAM", len(ahead), MAX_EARLY)


def _take(size: int, read: fields.Read) -> bytes:
    return read(size)
