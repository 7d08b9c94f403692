"""Verbs of `srcd` about parked VMs, which need no daemon."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import argparse

VERBS: Final = ("inspect", "verify", "import", "describe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One of VERBS. `file` is what to import; `json`: print for a program.

    `qmp` is the socket of the QEMU that the VM runs in, or has run in; `command`
    the file that has its command line, "-" for standard input.
    """

    verb: str
    directory: Path
    file: Path | None = None
    json: bool = False
    copy: bool = False
    qmp: str | None = None
    command: str | None = None


def add_verbs(verbs: argparse._SubParsersAction[Any]) -> None:
    inspect = verbs.add_parser("inspect", help="say what a parked VM is")
    inspect.add_argument("directory", metavar="DIR", type=Path)
    inspect.add_argument("--json", action="store_true", help="for programs")
    verify = verbs.add_parser("verify", help="read all of a parked VM, is it whole?")
    verify.add_argument("directory", metavar="DIR", type=Path)
    bring = verbs.add_parser("import", help="make a file of QEMU's a parked VM")
    bring.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="what `migrate file:` or `virsh save` wrote",
    )
    bring.add_argument("directory", metavar="DIR", type=Path, help="new, or empty")
    bring.add_argument(
        "--copy",
        action="store_true",
        help="copy the RAM of a mapped-ram file, which is used in place otherwise",
    )
    describe = verbs.add_parser("describe", help="note what a VM's command line is")
    describe.add_argument(
        "directory", metavar="DIR", type=Path, help="parked in it, or about to be"
    )
    describe.add_argument(
        "--qmp",
        metavar="SOCKET",
        help="ask the QEMU that the VM runs in, or has run in",
    )
    describe.add_argument(
        "--command",
        metavar="FILE",
        help="its command line as for a shell, or /proc/PID/cmdline; - is stdin",
    )


def errand_of(found: argparse.Namespace) -> Errand:
    members = {name: value for name, value in vars(found).items() if name in _MEMBERS}
    return Errand(**members)


_MEMBERS: Final = tuple(field.name for field in fields(Errand))
