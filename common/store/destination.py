"""The command line that a destination needs, made of the source's.

Devices, memory and CPU have to be the same, so every option stays but those that
say how the source itself began. What depends on the host is named, not changed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.store import shell

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Of QEMU 7.2 and 10, `-help`: the options that take no argument.
_FLAGS: Final = (
    "S alt-grab ctrl-grab curses daemonize enable-fips enable-kvm enable-sync-profile"
    " full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet no-kvm"
    " no-quit no-reboot no-shutdown no-user-config nodefaults nographic nouserconfig"
    " old-param one-insn-per-tb only-migratable perfmap portrait preconfig s sdl"
    " singlestep snapshot usb version win2k-hack xen-attach xen-domid-restrict"
)
FLAGS: Final = frozenset(_FLAGS.split())
DROPPED: Final = {
    "daemonize": "not for a QEMU that you are watching; add it again if you like",
    "pidfile": "the old QEMU may still have that file",
    "S": "the VM was running",
    "loadvm": "the VM's state comes from the directory",
    "incoming": "it comes from srcd",
    "preconfig": "the destination waits without it",
}
_MACHINE: Final = ("M", "machine")

_DISK: Final = "the disk has to be as it was when the VM was parked, and nobody else's"
_SOCKET: Final = "has to be free on this host: is the old QEMU gone?"
_FD: Final = "a descriptor that another program gave to the old QEMU; name a file"
_NETWORK: Final = "has to be there on this host, and not another QEMU's"
_FILE: Final = "a file that has to be here as well"
_DISKS: Final = (
    *("hda", "hdb", "hdc", "hdd", "fda", "fdb", "cdrom", "sd", "mtdblock", "pflash"),
)
_CONSOLES: Final = (
    *("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb"),
    *("chardev", "vnc", "spice"),
)

# Options, what their argument has in it, and what to look at then.
LOOK_AT: Final = tuple(
    (frozenset(options), re.compile(pattern), what)
    for options, pattern, what in (
        (_DISKS, r"", _DISK),
        (("drive",), r"(^|,)file=", _DISK),
        (("blockdev",), r"filename|\bpath\b|host_device|\bserver\b", _DISK),
        (("snapshot",), r"", "what the VM wrote to its disks was in temporary files"),
        (("drive",), r"snapshot=on", "what the VM wrote to it was in a temporary file"),
        (_CONSOLES, r"(^|[:=])fd:|\bfd=|/dev/fdset", _FD),
        (
            _CONSOLES,
            r"^(?!.*fd[=:/]).*(\bunix:|\btcp:|\btelnet:|\bsocket\b|\bport=|\budp)",
            _SOCKET,
        ),
        (("vnc",), r":\d", _SOCKET),
        (_CONSOLES, r"\bfile:|^(file|pipe),|^pipe:", "is written to from its start"),
        (_CONSOLES, r"^/dev/|^(parallel|serial|tty),", _NETWORK),
        (("s",), r"", "port 1234 has to be free on this host"),
        (("add-fd",), r"", _FD),
        (("netdev", "nic", "net", "drive", "device", "object"), r"fds?=\d", _FD),
        (("netdev", "nic", "net"), r"(^|,|=)(tap|bridge|vde|l2tpv3|vhost)", _NETWORK),
        (("netdev", "nic", "net"), r"^(socket|stream|dgram)|hostfwd=", _SOCKET),
        (("bios", "kernel", "initrd", "dtb", "readconfig"), r"", _FILE),
        (("fw_cfg", "acpitable", "smbios", "object"), r"\bfile=|^file", _FILE),
        (
            ("mem-path",),
            r"",
            "no memory in a file on a disk if it is to come lazily; tmpfs is fine",
        ),
        (
            ("object",),
            r"mem-path",
            "a file of its own; on a disk the memory cannot come lazily",
        ),
        (("cpu",), r"^(host|max)\b", "the CPU of this host has to be the old one's"),
        (("device",), r"vhost|usb-host|path=|host=", _NETWORK),
        (("runas", "run-with", "chroot", "D", "trace"), r"", "depends on this host"),
    )
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option with its dash and its argument; a word without dash is a disk."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Without dashes; of a disk's image that of the option it stands for."""
        first = self.words[0]
        if not _is_option(first):
            return "hda"
        return first.removeprefix("-").removeprefix("-")

    @property
    def argument(self) -> str:
        return self.words[-1] if len(self.words) > 1 or self.name == "hda" else ""

    def __str__(self) -> str:
        return " ".join(map(shell.quote, self.words))


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """`options` of `program` for a QEMU that the VM can come to.

    `changes` says what is other than at the source, `look_at` what only somebody
    who knows this host can decide; sentences for people.
    """

    program: str
    options: tuple[Option, ...]
    changes: tuple[str, ...]
    look_at: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """For a shell, an option a line."""
        parts = [shell.quote(self.program), *map(str, self.options)]
        return [
            *(f"{part} \\" for part in parts[:-1]),
            parts[-1],
        ]

    @property
    def words(self) -> list[str]:
        return [self.program, *(word for one in self.options for word in one.words)]


def destination(words: Sequence[str], machine: str, *, running: bool) -> Destination:
    """For a VM that is `machine` by its stream and was `running` or not."""
    changes: list[str] = []
    options: list[Option] = []
    for option in _options(words[1:]):
        if option.name in DROPPED:
            changes += _dropped(option, running=running)
        else:
            options.append(option)
    options = _versioned(options, machine, changes)
    look_at = [sentence for one in options for sentence in _look_at(one)]
    options.append(Option(("-incoming", "defer")))
    changes.append("added: -incoming defer")
    if not running:
        options.append(Option(("-S",)))
        changes.append("added: -S, so that the VM stays paused")
    return Destination(
        program=words[0],
        options=tuple(options),
        changes=tuple(changes),
        look_at=tuple(dict.fromkeys(look_at)),
    )


def _options(words: Sequence[str]) -> Iterable[Option]:
    """An option that is not a flag takes the next word, whatever it is."""
    at = 0
    while at < len(words):
        one = Option((words[at],))
        takes = _is_option(words[at]) and one.name not in FLAGS
        count = 2 if takes else 1
        yield Option(tuple(words[at : at + count]))
        at += count


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _dropped(option: Option, *, running: bool) -> Iterable[str]:
    if option.name == "S" and not running:
        return
    yield f"left out: {option} ({DROPPED[option.name]})"


def _versioned(
    options: Sequence[Option], machine: str, changes: list[str]
) -> list[Option]:
    """With the machine's own name: `pc` is another one in another QEMU."""
    found = [_with_machine(one, machine) for one in options]
    if not any(one.name in _MACHINE and _type(one.argument) for one in options):
        found.insert(0, Option(("-machine", machine)))
    changed = [one for one in found if one not in options]
    changes += [f"changed: {one} (the machine that it was)" for one in changed]
    return found


def _type(argument: str) -> str | None:
    """The machine's type in an argument of -machine."""
    first, *others = argument.split(",")
    if first and "=" not in first:
        return first
    types = [one for one in (first, *others) if one.startswith("type=")]
    return types[-1].removeprefix("type=") if types else None


def _with_machine(option: Option, machine: str) -> Option:
    if option.name not in _MACHINE or (found := _type(option.argument)) is None:
        return option
    members = [
        one.replace(found, machine) if one in (found, f"type={found}") else one
        for one in option.argument.split(",")
    ]
    return Option((option.words[0], ",".join(members)))


def _look_at(option: Option) -> Iterable[str]:
    for names, pattern, what in LOOK_AT:
        if option.name in names and pattern.search(option.argument):
            yield f"{option}: {what}"
