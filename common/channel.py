"""Main and preempt channel: connect, listen, read, write, hand over, close.

A channel is a C object over a descriptor. Python's reads and writes run in
worker threads, as the loops that use the same channel do. One reader at a time.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from common.address import Address, Exec, Fd, File, Tcp, Unix, Vsock, takes_many
from common.errors import ChannelLost, HostError, MigrationError
from common.native._native import ffi, lib
from common.native.loop import Stop, check, run_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

    from common.native import CData
    from common.qmp.message import Json

T = TypeVar("T")

# How long the last message may take to be taken by the peer before we close.
DRAIN_SECONDS: Final = 10.0
# In the time in which a silent peer is given up.
KEEPALIVE_PROBES: Final = 3
ANY_HOST: Final = ("", "0")
MAX_UNIX_PATH: Final = 107  # bytes: sun_path of unix(7), less its end


class Channel:
    """A byte channel that owns its descriptor and its stop eventfd.

    `process` is the command at its other end, if that is one; it is owned too.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        stop: Stop | None = None,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.fd = fd
        self.name = name
        self._process = process
        self._owns_stop = stop is None
        self.stop = stop or Stop()
        self.native = ffi.new("struct channel *")
        check(lib.channel_open(self.native, fd, self.stop.fd))

    @property
    def sent(self) -> int:
        """Bytes handed to the kernel."""
        return int(self.native.bytes_sent)

    @property
    def received(self) -> int:
        return int(self.native.bytes_received)

    def peer(self) -> str:
        """Who is at the other end, for people."""
        if not self.native.is_socket:
            return "a file"
        try:
            with socket.socket(fileno=os.dup(self.fd)) as sock:
                name = sock.getpeername()
        except OSError:
            return "a connection that is gone"
        return f"{name[0]} port {name[1]}" if isinstance(name, tuple) else "this host"

    def hung_up(self) -> bool:
        """Whether the peer has closed its side; asks without waiting."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    async def write(self, data: bytes) -> None:
        """Write whole units of the stream: no other writer comes between."""
        if not await run_loop(
            lambda: lib.channel_write(self.native, data, len(data)), self.stop
        ):
            raise ChannelLost("the channel was shut down", channel=self.name)

    def read_exactly(self, size: int) -> bytes:
        """Blocks: for decoders that run in a worker thread, see `decode`."""
        data = ffi.new("char[]", size)
        if not check(lib.channel_read(self.native, data, size)):
            raise ChannelLost("the channel was shut down", channel=self.name)
        return bytes(ffi.buffer(data, size))

    async def read_some(self) -> bytes:
        """What has come, and that is at least one byte; nothing at the end."""
        try:
            more = await run_loop(lambda: lib.channel_fill(self.native, 1), self.stop)
        except ChannelLost as error:
            if error.errno:
                raise
            return b""
        if not more:
            raise ChannelLost("the channel was shut down", channel=self.name)
        return self.read_exactly(lib.channel_buffered(self.native))

    async def look(self, size: int) -> bytes:
        """What has come, and at least `size` bytes; all of it stays to be read."""
        if not await run_loop(lambda: lib.channel_fill(self.native, size), self.stop):
            raise ChannelLost("the channel was shut down", channel=self.name)
        buffered = lib.channel_buffered(self.native)
        return bytes(ffi.buffer(self.native.buffer + self.native.start, buffered))

    async def decode(self, decoder: Callable[[Callable[[int], bytes]], T]) -> T:
        """Run a decoder that pulls its bytes from this channel."""
        found: list[T] = []

        def pull() -> CData:
            found.append(decoder(self.read_exactly))
            return _OK

        await run_loop(pull, self.stop)
        return found[0]

    async def at_end(self) -> bool:
        """Wait for a byte or the end; true if it is the end."""
        try:
            return not await run_loop(
                lambda: lib.channel_fill(self.native, 1), self.stop
            )
        except ChannelLost:
            return True

    async def finish(self) -> None:
        """A command at the other end has got all, or said all: wait until it ends.

        HostError if it says that it failed. Nothing is sent or read any more.
        """
        if self._process is None:
            return
        self._close_descriptor()
        status = await trio.to_thread.run_sync(
            self._process.wait, abandon_on_cancel=True
        )
        if status:
            raise HostError(f"the command at the channel's end failed: status {status}")

    async def drain(self) -> bool:
        """Tell the peer that no more comes, and wait until it has closed.

        A socket that is closed with unread bytes in it loses what was written
        last; SHUT must not be lost. False: perhaps it is.
        """
        with trio.move_on_after(DRAIN_SECONDS), suppress(MigrationError, OSError):
            await self.finish()
            self._shutdown(socket.SHUT_WR)
            return not self.native.is_socket or await self._closed_by_peer()
        return False

    async def _closed_by_peer(self) -> bool:
        """Wait for the end, whatever comes before it; false if it is another one."""
        try:
            while await run_loop(lambda: lib.channel_fill(self.native, 1), self.stop):
                lib.channel_skip(self.native)
        except ChannelLost as error:
            return error.errno is None
        return False

    def shutdown(self) -> None:
        """Break the connection and end every loop on it."""
        self.stop.set()
        self.break_connection()

    def break_connection(self) -> None:
        """Break the connection; loops on it see its end."""
        with suppress(OSError):
            self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        if self.native.is_socket:
            with socket.socket(fileno=os.dup(self.fd)) as sock:
                sock.shutdown(how)

    def close(self) -> None:
        """No loop may be on it any more; a command that still runs is ended."""
        lib.channel_close(self.native)
        self._close_descriptor()
        if self._owns_stop:
            self.stop.close()
        if self._process:
            _end(self._process)

    def _close_descriptor(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_OK: Final = lib.result_ok()


# --- connecting -----------------------------------------------------------------


async def connect(
    address: Address,
    name: str,
    stop: Stop | None = None,
    *,
    congestion: str | None = None,
    peer_timeout: int = 0,
) -> Channel:
    """A channel to `address`; ChannelLost in QEMU's words if that fails.

    `congestion` names a TCP congestion control, see tcp(7). After `peer_timeout`
    seconds of silence the channel is lost; 0: when the kernel notices.
    """
    match address:
        case Tcp():
            sock = await _connect_socket(address)
            _control_congestion(sock, congestion)
            _bound_silence(sock, peer_timeout)
            return Channel(sock, name, stop)
        case Unix() | Vsock():
            return Channel(await _connect_socket(address), name, stop)
        case Fd():
            return Channel(_given(address), name, stop)
        case File(path, offset):
            return Channel(
                _open_file(path, offset, os.O_WRONLY | os.O_CREAT), name, stop
            )
        case Exec(arguments):
            process = _run(arguments, stdin=subprocess.PIPE)
            return Channel(_take(process.stdin), name, stop, process)


async def _connect_socket(address: Tcp | Unix | Vsock) -> int:
    try:
        match address:
            case Tcp():
                return await _connect_tcp(address)
            case Unix():
                sock, name = _new_socket(socket.AF_UNIX), address.name
                return await _connect_to(sock, name)
            case Vsock(cid, port):
                sock = _new_socket(socket.AF_VSOCK)
                return await _connect_to(sock, (int(cid), int(port)))
    except (OSError, UnicodeError) as error:
        reason = _reason(error)
        raise ChannelLost(f"Failed to connect to '{address}': {reason}") from None


def _control_congestion(fd: int, name: str | None) -> None:
    if name is None:
        return
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            os.close(fd)
            raise ChannelLost(
                f"congestion control '{name}': {error.strerror}; those that can be"
                " used are in /proc/sys/net/ipv4/tcp_allowed_congestion_control"
            ) from None


def _bound_silence(fd: int, seconds: int) -> None:
    """A TCP peer that acknowledges nothing for so long is gone; 0: as usual.

    Also one that takes nothing for so long, though it acknowledges. Keepalive is
    for a connection on which nothing is to be acknowledged. Source: tcp(7).
    """
    if not seconds:
        return
    probe = max(1, seconds // KEEPALIVE_PROBES)
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, probe),
            (socket.TCP_KEEPINTVL, probe),
            (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
            (socket.TCP_USER_TIMEOUT, seconds * 1000),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _connect_tcp(address: Tcp) -> int:
    host = address.host or "localhost"
    if not (address.ipv4 and address.ipv6):
        host = await _numeric(host, _family(address))
    stream = await trio.open_tcp_stream(host, int(_port(address.port)))
    stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, address.keep_alive)
    return stream.socket.detach()


def _family(address: Tcp) -> socket.AddressFamily:
    if address.ipv4 and address.ipv6:
        return socket.AF_UNSPEC
    return socket.AF_INET if address.ipv4 else socket.AF_INET6


async def _numeric(host: str, family: socket.AddressFamily) -> str:
    """The first address of `host` in that family."""
    found = await trio.socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
    return str(found[0][4][0])


async def _local(address: Tcp) -> str | None:
    """What to listen on; None is every address of both families."""
    family = _family(address)
    if address.host in ANY_HOST:
        return {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}.get(family)
    if family is socket.AF_UNSPEC:
        return address.host
    return await _numeric(address.host, family)


def _new_socket(family: socket.AddressFamily) -> trio.socket.SocketType:
    return trio.socket.socket(family, socket.SOCK_STREAM)


async def _connect_to(sock: trio.socket.SocketType, name: str | tuple[int, int]) -> int:
    try:
        await sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock.detach()


def _given(address: Fd) -> int:
    """The descriptor that a client named; it is ours from here on."""
    if address.number is None:
        raise HostError(f"File descriptor named '{address}' has not been found")
    return address.number


def _reason(error: OSError | UnicodeError) -> str:
    """trio gathers the failures of all addresses; the first one tells."""
    cause: BaseException | None = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
        # Not strerror: trio puts the address in front of it.
        return os.strerror(cause.errno)
    return (getattr(cause, "strerror", None) or str(cause)) if cause else str(error)


class UnknownService(OSError):
    """A port's name that this host does not know."""


def _port(port: str) -> int:
    if port.isdecimal():
        return int(port)
    try:
        return socket.getservbyname(port)
    except OSError:
        raise UnknownService(f"no service is called {port!r}") from None


def _open_file(path: str, offset: int, flags: int) -> int:
    if flags & os.O_CREAT and not offset:
        flags |= os.O_TRUNC
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        verb = "create" if flags & os.O_CREAT else "open"
        raise HostError(f"Could not {verb} '{path}': {error.strerror}") from None
    os.lseek(fd, offset, os.SEEK_SET)
    return fd


def _run(
    arguments: Sequence[str], *, stdin: int | None = None, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a command, in a group of its own: what it starts is ended with it."""
    try:
        return subprocess.Popen(arguments, stdin=stdin, stdout=stdout, process_group=0)
    except OSError as error:
        raise HostError(f"Could not run '{arguments[0]}': {error.strerror}") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _take(pipe: IO[bytes] | None) -> int:
    """The descriptor of a pipe, ours alone."""
    assert pipe is not None
    with pipe:
        return os.dup(pipe.fileno())


# --- listening --------------------------------------------------------------------


class Listener:
    """Where a destination waits for its source: one or more sockets, or a file.

    `peer_timeout` as in `connect`, for the channels that come in.
    """

    def __init__(self, address: Address, *, peer_timeout: int = 0) -> None:
        self.address = address
        self._peer_timeout = peer_timeout
        self._sockets: list[trio.socket.SocketType] = []
        self._path: tuple[str, int] | None = None  # and the inode that we made
        self._only: Channel | None = None  # not accepted yet

    @property
    def many(self) -> bool:
        """Whether more than one channel can come in."""
        return takes_many(self.address)

    async def open(self) -> None:
        """HostError in QEMU's words if the address cannot be bound or opened."""
        try:
            match self.address:
                case Tcp():
                    await self._open_tcp(self.address)
                case Unix():
                    await self._open_unix(self.address)
                case Vsock(cid, port):
                    await self._bind(socket.AF_VSOCK, (int(cid), int(port)))
                case Fd():
                    self._only = Channel(_given(self.address), "main")
                case File(path, offset):
                    self._only = Channel(_open_file(path, offset, os.O_RDONLY), "main")
                case Exec(arguments):
                    process = _run(arguments, stdout=subprocess.PIPE)
                    self._only = Channel(_take(process.stdout), "main", process=process)
        except (OSError, UnicodeError) as error:
            reason = _reason(error)
            raise HostError(
                f"Failed to bind socket to {self.address}: {reason}"
            ) from None

    async def _open_tcp(self, address: Tcp) -> None:
        """On the port, or on the first free one up to `to`."""
        try:
            host = await _local(address)
            first = _port(address.port)
            last = max(first, address.to or 0)
            while True:
                try:
                    found = await trio.open_tcp_listeners(first, host=host)
                    break
                except OSError as error:
                    if first == last or error.errno != errno.EADDRINUSE:
                        raise
                first += 1
        except (socket.gaierror, UnknownService, UnicodeError) as error:
            raise HostError(
                f"address resolution failed for {address}: {_reason(error)}"
            ) from None
        self._sockets = [listener.socket for listener in found]

    async def _open_unix(self, address: Unix) -> None:
        if not address.abstract:
            if len(os.fsencode(address.path)) > MAX_UNIX_PATH:
                raise HostError(f"UNIX socket path '{address}' is too long")
            with suppress(FileNotFoundError):
                os.unlink(address.path)
        await self._bind(socket.AF_UNIX, address.name)
        if not address.abstract:
            self._path = address.path, os.stat(address.path).st_ino

    async def _bind(
        self, family: socket.AddressFamily, name: str | tuple[int, int]
    ) -> None:
        sock = _new_socket(family)
        try:
            await sock.bind(name)
            sock.listen()
        except BaseException:
            sock.close()
            raise
        self._sockets = [sock]

    def describe(self) -> list[dict[str, Json]]:
        """The `socket-address` of query-migrate."""
        return [_describe(sock) for sock in self._sockets]

    @property
    def lasting(self) -> Address | None:
        """Where another process can listen in our place; None: it cannot."""
        if isinstance(self.address, Tcp) and self._sockets:
            port = str(self._sockets[0].getsockname()[1])
            return replace(self.address, port=port, to=None)
        return self.address if isinstance(self.address, Unix | Vsock) else None

    @property
    def lost(self) -> bool:
        """Whether nobody can connect, but could if it was opened again."""
        if not self._sockets:
            known = not isinstance(self.address, Tcp) or self.address.port != "0"
            return known and self.many
        return self._path is not None and not _is_file(*self._path)

    async def reopen(self) -> None:
        """Listen where it did; HostError, and it is lost, if that is impossible."""
        self.address = self.lasting or self.address
        self.close()
        await self.open()

    def is_at(self, address: Address) -> bool:
        """Whether whoever connects to `address` comes here."""
        if isinstance(address, Tcp):
            names = [sock.getsockname() for sock in self._sockets]
            if (address.host, address.port) in [(n[0], str(n[1])) for n in names]:
                return True
            if address.port == "0":  # any other one
                return False
        return bool(self._sockets) and address == self.address

    async def accept(self, name: str, stop: Stop | None = None) -> Channel:
        """The next channel that comes in; from a file or command there is one."""
        if self._only:
            channel, self._only = self._only, None
            return channel
        if not self._sockets:
            await trio.sleep_forever()
        return Channel(await self._accept_socket(), name, stop)

    async def _accept_socket(self) -> int:
        accepted: list[trio.socket.SocketType] = []

        async def wait(sock: trio.socket.SocketType) -> None:
            try:
                found, _ = await sock.accept()
            except OSError as error:
                reason = f"cannot accept a connection: {error.strerror}"
                raise HostError(reason, errno=error.errno) from None
            accepted.append(found)
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for sock in self._sockets:
                    nursery.start_soon(wait, sock)
            fd = accepted.pop(0).detach()
        finally:
            for surplus in accepted:
                surplus.close()
        if isinstance(self.address, Tcp):
            with socket.socket(fileno=os.dup(fd)) as found:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _bound_silence(fd, self._peer_timeout)
        return fd

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        if self._only:
            self._only.close()
            self._only = None
        if self._path:
            # Somebody else may listen under this name by now.
            if _is_file(*self._path):
                os.unlink(self._path[0])
            self._path = None


def _is_file(path: str, inode: int) -> bool:
    try:
        return os.stat(path).st_ino == inode
    except OSError:
        return False


def _describe(sock: trio.socket.SocketType) -> dict[str, Json]:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        abstract = isinstance(name, bytes)
        path = os.fsdecode(name[1:]) if abstract else name
        more: dict[str, Json] = {"abstract": True} if abstract else {}
        return {"type": "unix", "path": path, **more}
    if sock.family == socket.AF_VSOCK:
        return {"type": "vsock", "cid": str(name[0]), "port": str(name[1])}
    version = "ipv6" if sock.family == socket.AF_INET6 else "ipv4"
    return {"type": "inet", "host": name[0], "port": str(name[1]), version: True}
