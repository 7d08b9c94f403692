"""How automatic recovery is set: parameters of ours, or a table of the file.

`x-postcopyd-recovery-auto` of `migrate-set-parameters` is `auto` in the table
`[recovery]` of the configuration file, and so are the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from common.qmp import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.qmp.message import Json
    from common.settings import Settings

PREFIX: Final = "x-postcopyd-recovery-"
TABLE: Final = "recovery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Whether, when and how often; delays in seconds, 0 attempts are no limit."""

    auto: bool
    first_delay: int
    greatest_delay: int
    attempts: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            auto=settings.parameters()[PREFIX + "auto"] is True,
            first_delay=settings.number(PREFIX + "first-delay"),
            greatest_delay=settings.number(PREFIX + "greatest-delay"),
            attempts=settings.number(PREFIX + "attempts"),
        )

    def delay(self, attempt: int) -> int:
        """Seconds to wait before the attempt of that number, counting from 1."""
        delay = self.first_delay
        for _ in range(1, attempt):
            if delay >= self.greatest_delay:
                break
            delay = max(2 * delay, 1)
        return min(delay, self.greatest_delay)

    def exhausted(self, attempts: int) -> bool:
        """Whether so many in a row are all that may be made."""
        return bool(self.attempts) and attempts >= self.attempts


def table(known: schema.Schema) -> schema.Object:
    """What `[recovery]` may have."""
    members = known.object("MigrationParameters").members
    return schema.Object(
        tuple(
            replace(member, name=member.name.removeprefix(PREFIX))
            for member in members
            if member.name.startswith(PREFIX)
        )
    )


def parameters(content: Mapping[str, Json]) -> Mapping[str, Json]:
    """The parameters that the content of the table stands for."""
    return {PREFIX + name: value for name, value in content.items()}
