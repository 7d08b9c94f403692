"""A destination that takes everything, and never says whether it runs the VM.

It answers the source's questions before the switchover, like any QEMU, and is
silent about the package. `wait_package` returns when that has come.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

from common.stream import command, returnpath
from common.stream import constants as c

PATIENCE = 30.0
# What there is to answer; a package is led by the PING after the discards.
_ANSWERED = (c.PING_FIRST, c.PING_SETUP)
_PACKAGE = command.encode(command.Ping(c.PING_DISCARDED))


class MuteDestination:
    """Listens on a port of its own; leaving the context closes what it took."""

    def __enter__(self) -> Self:
        self._package = threading.Event()
        self._taken: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._server, *self._taken):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._thread.join(PATIENCE)

    def wait_package(self) -> None:
        assert self._package.wait(PATIENCE), "no package has come"

    def close_main(self) -> None:
        """In order, as a QEMU does that refuses the VM."""
        self._taken[0].shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            main, _ = self._server.accept()
            self._taken.append(main)
            threading.Thread(target=self._refuse_more, daemon=True).start()
            self._answer(main)

    def _refuse_more(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._server.accept()[0].close()

    def _answer(self, main: socket.socket) -> None:
        seen = b""
        while received := main.recv(65536):
            seen += received
            for number in _ANSWERED:
                ping = command.encode(command.Ping(number))
                while ping in seen:
                    seen = seen.replace(ping, b"", 1)
                    main.sendall(returnpath.encode(returnpath.Pong(number)))
            if _PACKAGE in seen:
                self._package.set()
