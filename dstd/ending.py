"""The end of a precopy stream whose device sections nobody here can read.

A FULL section has no length. The description behind EOF has all of them, and
comes last, so everything behind RAM's END is kept until it fits together. That
is also the only sign that it is complete: the source says nothing more and
waits for SHUT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, vmdesc

if TYPE_CHECKING:
    from common.channel import Channel

MAX_ENDING: Final = c.MAX_PACKAGE + c.MAX_VMDESC  # bytes
# What a JSON object ends with; srcd may add spaces. Anywhere else it is not
# worth a pass over all that was kept.
_LAST_OF_DESCRIPTION: Final = (b"}", b" ")


async def receive_ending_untrusted(channel: Channel, begun: bytes) -> vmdesc.Ending:
    """The rest of the stream, taken apart; `begun` was read of it already.

    StreamError if the channel ends, or MAX_ENDING is reached, before that.
    """
    kept = bytearray(begun)
    while more := await channel.read_some():
        kept += more
        fields.bounded("end of the stream", len(kept), MAX_ENDING)
        if kept.endswith(_LAST_OF_DESCRIPTION):
            ending = vmdesc.split_ending_untrusted(bytes(kept))
            if ending is not None:
                return ending
    raise StreamError(
        "the stream ends without the description that tells how long its device"
        " sections are"
    )
