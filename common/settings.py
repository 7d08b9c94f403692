"""Capabilities and parameters of one daemon: what they are set to, what goes.

Names, types, ranges and defaults come from the schema; here are the rules about
combinations, in QEMU's order and words, and what this implementation offers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import HostError
from common.qmp import human_values, schema
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
        "pause-before-switchover",
        "late-block-activate",
        "zero-blocks",
    }
)

PREEMPT: Final = "postcopy-preempt"
_SNAPSHOT: Final = "background-snapshot"
_ALONE: Final = "Background-snapshot is not compatible with "
_ZERO_COPY: Final = (
    "Zero copy only available for non-compressed non-TLS multifd migration"
)
_DIRTY_RING: Final = (
    "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """`text` refuses `one` together with `other`, or without `needs`.

    With `listening` it refuses switching `one` on once a destination listens.
    """

    one: str
    other: str = ""
    needs: str = ""
    listening: bool = False
    text: str

    def broken(self, would: Mapping[str, bool]) -> bool:
        if not would[self.one]:
            return False
        if self.other:
            return would[self.other]
        return not would.get(self.needs, False)


# In QEMU's order; the first that is broken answers.
_RULES: Final = (
    _Rule(
        one="postcopy-ram",
        other="x-ignore-shared",
        text="Postcopy is not compatible with ignore-shared",
    ),
    _Rule(
        one="postcopy-ram",
        other="multifd",
        text="Postcopy is not yet compatible with multifd",
    ),
    *(
        _Rule(one=_SNAPSHOT, other=name, text=_ALONE + name)
        for name in (
            "postcopy-ram",
            "dirty-bitmaps",
            "postcopy-blocktime",
            "late-block-activate",
            "return-path",
            "multifd",
            "pause-before-switchover",
            "auto-converge",
            "release-ram",
            "rdma-pin-all",
            "xbzrle",
            "x-colo",
            "validate-uuid",
            "zero-copy-send",
        )
    ),
    _Rule(one="zero-copy-send", needs="multifd", text=_ZERO_COPY),
    _Rule(one="zero-copy-send", other="xbzrle", text=_ZERO_COPY),
    _Rule(
        one=PREEMPT, needs="postcopy-ram", text="Postcopy preempt requires postcopy-ram"
    ),
    _Rule(
        one=PREEMPT,
        listening=True,
        text="Postcopy preempt must be set before incoming starts",
    ),
    _Rule(
        one="multifd",
        listening=True,
        text="Multifd must be set before incoming starts",
    ),
    _Rule(
        one="switchover-ack",
        needs="return-path",
        text="Capability 'switchover-ack' requires capability 'return-path'",
    ),
    _Rule(
        one="dirty-limit",
        other="auto-converge",
        text="dirty-limit conflicts with auto-converge"
        " either of then available currently",
    ),
    _Rule(one="dirty-limit", text=_DIRTY_RING),
    _Rule(one="multifd", other="xbzrle", text="Multifd is not compatible with xbzrle"),
    _Rule(
        one="mapped-ram",
        other="xbzrle",
        text="Mapped-ram migration is incompatible with xbzrle",
    ),
    _Rule(
        one="mapped-ram",
        other="postcopy-ram",
        text="Mapped-ram migration is incompatible with postcopy",
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
        for rule in _RULES:
            if rule.listening:
                broken = rule.one in new and self.listening()
            else:
                broken = rule.broken(would)
            if broken:
                raise CommandError(rule.text)

    # -- over the daemon's death

    def snapshot(self) -> Mapping[str, Json]:
        """All of it, for `restore`."""
        on: list[Json] = [name for name, on in self._on.items() if on]
        return {"capabilities": on, "parameters": self.parameters()}

    def restore_untrusted(self, snapshot: Mapping[str, Json]) -> None:
        """What was set when `snapshot` was made; HostError if that cannot be.

        Nothing is probed: the guest may be in the middle of its migration.
        """
        try:
            self._restore_untrusted(snapshot)
        except CommandError as error:
            raise HostError(
                "the settings of the daemon before this one are not known here:"
                f" {error}; go on with the release that it was of"
            ) from None

    def _restore_untrusted(self, snapshot: Mapping[str, Json]) -> None:
        on, parameters = snapshot.get("capabilities"), snapshot.get("parameters")
        if not isinstance(on, list) or not isinstance(parameters, dict):
            raise CommandError("kept settings that are none")
        known = self._schema.object("MigrationParameters")
        known.check(parameters, "parameters")
        self._on = {name: name in on and name in SUPPORTED for name in self._on}
        self.set_parameters(parameters)

    # -- parameters

    def number(self, parameter: str) -> int:
        value = self._parameters[parameter]
        assert isinstance(value, int)
        return value

    def text(self, parameter: str) -> str:
        return str(self._parameters[parameter])

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

    def set_parameter(self, name: str, value: Json) -> None:
        """One parameter; a text is read as people write it, with suffixes."""
        parameters = self._schema.object("MigrationParameters")
        if isinstance(value, str):
            value = human_values.parse(parameters, name, value)
        parameters.check_arguments({name: value})
        self.set_parameters({name: value})
