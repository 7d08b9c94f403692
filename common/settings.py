"""Capabilities and parameters of one daemon: what they are set to, what goes.

Names, types, ranges and defaults come from the schema; here are the rules about
combinations, in QEMU's order and words, and what this implementation offers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from common.qmp import schema
from common.qmp.session import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from common.qmp.message import Json

SUPPORTED: Final = frozenset(
    {
        "events",
        "postcopy-ram",
        "postcopy-preempt",
        "postcopy-blocktime",
        "return-path",
        "late-block-activate",
        "zero-blocks",
    }
)

# In this order; the first that applies answers.
_CONFLICTS: Final = (
    (
        "postcopy-ram",
        "x-ignore-shared",
        "Postcopy is not compatible with ignore-shared",
    ),
    ("postcopy-ram", "multifd", "Postcopy is not yet compatible with multifd"),
    (
        "dirty-limit",
        "auto-converge",
        "dirty-limit conflicts with auto-converge either of then available currently",
    ),
    ("multifd", "xbzrle", "Multifd is not compatible with xbzrle"),
    ("mapped-ram", "xbzrle", "Mapped-ram migration is incompatible with xbzrle"),
    (
        "mapped-ram",
        "postcopy-ram",
        "Mapped-ram migration is incompatible with postcopy",
    ),
)
_REQUIREMENTS: Final = (
    ("postcopy-preempt", "postcopy-ram", "Postcopy preempt requires postcopy-ram"),
    (
        "switchover-ack",
        "return-path",
        "Capability 'switchover-ack' requires capability 'return-path'",
    ),
)


class Settings:
    """The values of one daemon, for all its migrations.

    `postcopy_problem` says why this host cannot do postcopy, or nothing; asked
    when the capability is switched on. `changed` is called after parameters
    were stored.
    """

    def __init__(self) -> None:
        self._schema = schema.load()
        names = self._schema.enum("MigrationCapability")
        self._on: dict[str, bool] = dict.fromkeys(names, False)
        self._parameters = self._schema.defaults("MigrationParameters")
        self.postcopy_problem: Callable[[], str | None] = lambda: None
        self.listening: Callable[[], bool] = lambda: False
        self.changed: Callable[[], None] = lambda: None

    # -- capabilities

    def on(self, capability: str) -> bool:
        return self._on[capability]

    def capabilities(self) -> list[Json]:
        return [{"capability": name, "state": on} for name, on in self._on.items()]

    def set_capabilities(self, wanted: Sequence[Mapping[str, Json]]) -> None:
        """All or nothing: the combination that would result is checked."""
        would = dict(self._on)
        for item in wanted:
            would[str(item["capability"])] = bool(item["state"])
        new = {name for name, on in would.items() if on and not self._on[name]}
        self._check_combination(would, new)
        for name in would:
            if name in new and name not in SUPPORTED:
                raise CommandError(f"Capability '{name}' is not supported")
        self._on = would

    def _check_combination(self, would: Mapping[str, bool], new: set[str]) -> None:
        if "postcopy-ram" in new and (problem := self.postcopy_problem()):
            raise CommandError(f"Postcopy is not supported: {problem}")
        for one, other, text in _CONFLICTS:
            if would[one] and would[other]:
                raise CommandError(text)
        for one, other, text in _REQUIREMENTS:
            if would[one] and not would[other]:
                raise CommandError(text)
        if "postcopy-preempt" in new and self.listening():
            raise CommandError("Postcopy preempt must be set before incoming starts")

    # -- parameters

    def number(self, parameter: str) -> int:
        value = self._parameters[parameter]
        assert isinstance(value, int)
        return value

    def parameters(self) -> Mapping[str, Json]:
        return dict(self._parameters)

    def set_parameters(self, wanted: Mapping[str, Json]) -> None:
        """All or nothing: the set that would result is checked."""
        given = {name: "" if v is None else v for name, v in wanted.items()}
        would = {**self._parameters, **given}
        self._schema.check_ranges("MigrationParameters", would)
        if would["mode"] != "normal":
            raise CommandError(
                "Parameter 'mode' does not support anything but 'normal'"
            )
        self._parameters = would
        self.changed()
