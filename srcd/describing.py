"""The verb `describe`: what is known of a VM, noted beside it.

QMP tells what a QEMU is, but not its command line. That is known to the kernel,
of the process at the other end of a local socket.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import HostError
from common.store import description, files, manifest, receiving, shell
from common.store.directory import Parked
from srcd import questions

if TYPE_CHECKING:
    from srcd.errand import Errand


def describe(asked: Errand) -> None:
    """Note it, and say what was noted; HostError."""
    if asked.qmp is None and asked.command is None:
        raise HostError("give --qmp, --command or both: who knows the VM?")
    machine = _machine_of(asked.directory)
    known: dict[str, Any] = {"described": manifest.now()}
    if asked.qmp is not None:
        told = questions.ask(asked.qmp)
        _check_machine(told.facts, machine)
        known["qemu"] = told.facts
        known |= _from_process(told)
    if asked.command is not None:
        known[description.COMMAND] = _words(asked.command)
        known["command-line-from"] = "the operator"
    description.update(asked.directory, known)
    print(f"{asked.directory}: {_said(known)}")


def _said(known: dict[str, Any]) -> str:
    parts = [f"{len(known['qemu'])} facts by QMP"] if "qemu" in known else []
    if description.COMMAND in known:
        count = len(known[description.COMMAND])
        parts.append(f"a command line of {count} words, {known['command-line-from']}")
    return "noted " + " and ".join(parts)


def _machine_of(directory: Path) -> str | None:
    """Of the VM that is parked there, if it is already; HostError for other places."""
    if (directory / manifest.NAME).exists():
        with Parked.open(directory) as parked:
            return parked.manifest.machine
    with files.named(directory, "open"):
        names = {one.name for one in directory.iterdir()} - {description.NAME}
    if names and not receiving.is_here(directory):
        raise HostError(f"{directory} is neither empty nor a parked VM")
    return None


def _check_machine(facts: dict[str, Any], machine: str | None) -> None:
    found = facts["machine"]
    if machine not in (None, found):
        raise HostError(
            f"that QEMU is another VM: its machine is {found!a:.100}, and the parked"
            f" one is {machine}"
        )


def _from_process(told: questions.Told) -> dict[str, Any]:
    if told.words:
        return {
            description.COMMAND: told.words,
            "command-line-from": f"process {told.process}",
            **_working_directory(told.process),
        }
    print(
        f"srcd: the command line is not known: {told.why_not}; give it with --command",
        file=sys.stderr,
    )
    return {}


def _working_directory(process: int) -> dict[str, str]:
    """Where its relative paths begin; nothing if that may not be known."""
    try:
        return {"working-directory": os.readlink(f"/proc/{process}/cwd")}
    except OSError:
        return {}


def _words(name: str) -> list[str]:
    if name == "-":
        text = sys.stdin.buffer.read(shell.MAX_COMMAND + 1)
    else:
        text = files.read(Path(name), shell.MAX_COMMAND)
    try:
        return shell.words_untrusted(text)
    except shell.ShellError as error:
        where = "standard input" if name == "-" else name
        raise HostError(f"{where}: {error}") from None
