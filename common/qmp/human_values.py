"""Values of parameters as people write them on the human monitor.

A member's type in the schema decides how its text is read. CommandError carries
QEMU's words, without the `Error: ` that the human monitor puts in front.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from common import sizes
from common.qmp.schema import BUILTIN, Alternate, Array, Enum, Integer
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from common.qmp.message import Json
    from common.qmp.schema import Object, Type

# Where a number without a letter counts MiB; everywhere else it counts ones.
IN_MIB: Final = frozenset({"max-bandwidth", "avail-switchover-bandwidth"})
# What the human monitor adds to the refusal of such a number.
SIZE_HINT: Final = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
)
NO_SIZE: Final = "Parameter '{}' expects a non-negative number below 2^64"

_WORDS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
_NUMBER: Final = re.compile(r"(-?)(0x[0-9a-f]+|[0-9]{1,40})", re.ASCII | re.IGNORECASE)


def parse(members: Object, name: str, text: str) -> Json:
    """The value of the member `name` that `text` stands for."""
    found = {member.name: member.type for member in members.members}[name]
    match found:
        case Integer(high=sizes.MAX_SIZE):
            return _size(name, text)
        case Integer():
            return _number(found, name, text)
        case Enum() | Alternate():
            found.check(text, name)
            return text
        case Array():
            raise CommandError(f"The {name} parameter can only be set through QMP")
    return _switch(found, name, text)


def _size(name: str, text: str) -> int:
    try:
        return sizes.parse(text, sizes.MIB if name in IN_MIB else 1)
    except ValueError as error:
        if name in IN_MIB:
            raise CommandError(f"Invalid size {text}") from None
        if isinstance(error, sizes.OutOfRange):
            raise CommandError(
                f"Value '{text}' is out of range for parameter '{name}'"
            ) from None
        raise CommandError(NO_SIZE.format(name)) from None


def _number(found: Integer, name: str, text: str) -> int:
    number = _NUMBER.fullmatch(text)
    if not number:
        raise CommandError(found.not_integer.format(name))
    value = int(number[2], 16 if number[2][:2] in ("0x", "0X") else 10)
    if number[1]:
        raise CommandError(found.out_of_range.format(name, name))
    found.check(value, name)
    return value


def _switch(found: Type, name: str, text: str) -> bool:
    assert found is BUILTIN["bool"], name
    if text not in _WORDS:
        raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
    return _WORDS[text]
