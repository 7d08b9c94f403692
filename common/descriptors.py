"""Descriptors that clients passed with `getfd`, by the names they gave them."""

from __future__ import annotations

import os

from common.address import Address, Fd
from common.qmp.session import CommandError


class Descriptors:
    """Owns them until they are closed or a migration takes one."""

    def __init__(self) -> None:
        self._named: dict[str, int] = {}

    def add(self, name: str, fd: int | None) -> None:
        """Name `fd`, and close the one that had the name; QEMU's errors."""
        if fd is None:
            raise CommandError("No file descriptor supplied via SCM_RIGHTS")
        if name[:1].isdecimal():
            os.close(fd)
            raise CommandError(
                "Parameter 'fdname' expects a name not starting with a digit"
            )
        if (old := self._named.pop(name, None)) is not None:
            os.close(old)
        self._named[name] = fd

    def remove(self, name: str) -> None:
        """Close it."""
        if name not in self._named:
            raise CommandError(f"File descriptor named '{name}' not found")
        os.close(self._named.pop(name))

    def resolve(self, address: Address) -> Address:
        """`address`, and for `fd:` the descriptor, which is no longer ours then."""
        if not isinstance(address, Fd):
            return address
        return Fd(address.name, self._named.pop(address.name, None))

    def close(self) -> None:
        for fd in self._named.values():
            os.close(fd)
        self._named.clear()
