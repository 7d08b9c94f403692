"""The server: unix sockets, clients, and events to all of them, on trio.

Each client is a monitor of its own. Three tasks serve it: one reads and answers
out-of-band requests, one executes the others in order, one writes. They share
a session, a queue of lines, and one parking lot where each waits for its own
condition. In-band commands of all clients take turns, one at a time.

A client cannot hurt the daemon or its neighbours: one that does not read stops
being read from, and is dropped when events pile up; one that vanishes takes
its queue with it. Only the command being executed is always finished. What a
client sends is parsed piece by piece, and never further than its queue has
room: nobody waits for the nonsense of another, and it takes no memory.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from select import POLLHUP, poll
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from common.qmp import schema, session
from common.qmp.message import Json
from common.qmp.session import NEGOTIATE, QUEUE_LIMIT, Call, CommandError, Session
from common.qmp.turns import Share, Turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.qmp.session import Step

Handler: TypeAlias = Callable[[dict[str, Json]], Awaitable[Json]]

SOCKET_MODE: Final = 0o660
BACKLOG: Final = 1024
RECEIVE_BYTES: Final = 16384
# What is parsed at a time: the worst that can be sent takes 7 us a byte.
PIECE_BYTES: Final = 128
PARSE_SECONDS: Final = 0.001
# Descriptors of one client that no getfd has asked for yet.
MAX_DESCRIPTORS: Final = QUEUE_LIMIT
# Unsent bytes of one client: above the first nothing more is executed for it,
# above the second it is dropped. Only events can get it from one to the other.
UNSENT_PAUSE: Final = 1 << 17
UNSENT_LIMIT: Final = 1 << 20
# How long the end of the server waits for clients to take their last replies.
FLUSH_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class QmpServer:
    """Serves a table of command handlers on any number of sockets.

    A handler gets the checked arguments and returns the result, None for none;
    it may raise CommandError. `query-version`, `query-commands` and
    `query-qmp-schema` are answered here. `group` may connect to sockets that
    `listen` makes, besides their owner.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        version: tuple[int, int, int] = (10, 0, 2),
        package: str = "",
        group: int | None = None,
        described_by: schema.Schema | None = None,
    ) -> None:
        self._schema = described_by or schema.load()
        self._handlers: dict[str, Handler] = {
            **handlers,
            "query-version": self._query_version,
            "query-commands": self._query_commands,
            "query-qmp-schema": self._query_qmp_schema,
        }
        self.commands = self._schema.served_by([NEGOTIATE, *self._handlers])
        major, minor, micro = version
        self.version: Mapping[str, Json] = {
            "qemu": {"major": major, "minor": minor, "micro": micro},
            "package": package,
        }
        self._group = group
        self.parsing = Turns()
        self.executing = Turns()
        self.in_turn: _Connection | None = None  # whose command is executed
        self._connections: set[_Connection] = set()
        self._accepting: set[trio.CancelScope] = set()
        self._closing = False
        self._changed = trio.lowlevel.ParkingLot()

    # -- sockets

    async def listen(
        self,
        path: str | os.PathLike[str],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the unix socket `path` until `close`; it is removed at the end.

        A socket that nobody serves any more is replaced. Raises OSError if
        somebody does, or if the path cannot be bound.
        """
        with ExitStack() as file:
            sock = file.enter_context(_bound_socket(os.fspath(path), self._group))
            async with trio.open_nursery() as connections:
                await self._accept(sock, connections, task_status)
                file.close()  # already while the last replies go out

    async def serve(
        self,
        sock: socket.socket,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve a socket that is already listening, as a service manager gives."""
        async with trio.open_nursery() as connections:
            await self._accept(sock, connections, task_status)

    async def _accept(
        self,
        sock: socket.socket,
        connections: trio.Nursery,
        task_status: trio.TaskStatus[None],
    ) -> None:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        started = _Started(task_status)
        with trio.CancelScope() as accepting:
            self._accepting.add(accepting)
            if self._closing:
                accepting.cancel()
            try:
                await trio.serve_listeners(
                    self._converse,
                    [listener],
                    handler_nursery=connections,
                    task_status=started,
                )
            finally:
                self._accepting.remove(accepting)
                self._changed.unpark_all()

    async def _converse(self, stream: trio.SocketStream) -> None:
        connection = _Connection(self, stream)
        self._connections.add(connection)
        try:
            async with stream:
                if not self._closing:
                    await connection.run()
        finally:
            self._connections.remove(connection)
            self._changed.unpark_all()

    # -- for the daemon

    def event(self, name: str, data: Mapping[str, Json] | None = None) -> None:
        """Tell every client that has finished negotiating; never blocks.

        Called from a handler, it arrives before the handler's reply.
        """
        self._schema.events[name].check(data)
        line = session.event(name, data, time.time_ns())
        for connection in tuple(self._connections):
            connection.announce(line)

    def take_descriptor(self) -> int | None:
        """The oldest descriptor that came with the requests of the client whose
        in-band command is being executed; the handler's to close.
        """
        return self.in_turn.take_descriptor() if self.in_turn else None

    def close(self) -> None:
        """Begin the end: no new clients, no further requests.

        What is being executed is finished and answered, then clients get an
        end of file, and `listen` returns. Handlers may call this; `quit` does.
        """
        self._closing = True
        for accepting in self._accepting:
            accepting.cancel()
        for connection in self._connections:
            connection.close()

    async def stop(self) -> None:
        """`close`, and wait until every client has been served and is gone.

        Not for handlers: it would wait for the handler itself.
        """
        self.close()
        while self._connections or self._accepting:
            await self._changed.park()

    # -- executing

    async def execute(self, call: Call) -> bytes:
        """Run the handler; the line to send to the client."""
        handler = self._handlers[call.command.target]
        try:
            value = await handler(dict(call.arguments))
            return call.success({} if value is None else value)
        except CommandError as error:
            return call.failure(error)
        except Exception as error:
            # A fault of ours. The client is told, the log has the details, and
            # a guest is not lost because a query was wrong.
            log.exception("command %s failed", call.command.name)
            return call.failure(CommandError(f"internal error: {error!r}"))

    async def _query_version(self, arguments: Mapping[str, Json]) -> Json:
        return self.version

    async def _query_commands(self, arguments: Mapping[str, Json]) -> Json:
        return [{"name": name} for name in self.commands]

    async def _query_qmp_schema(self, arguments: Mapping[str, Json]) -> Json:
        return self._schema.introspect(self.commands.values())


class _Started:
    """Passes `started` on without the listeners that trio would report."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


class _Connection:
    """One client."""

    def __init__(self, server: QmpServer, stream: trio.SocketStream) -> None:
        self._server = server
        self._stream = stream
        self._session = Session(server.commands)
        self._changed = trio.lowlevel.ParkingLot()
        self._parsed, self._executed = Share(), Share()
        self._received = b""  # and not parsed yet
        self._descriptors: deque[int] = deque()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0  # of the list, and of what is being sent
        self._end_of_input = False
        self._closing = False  # no further request is executed
        self._dropped = False  # the client is gone, and so is what it was to get
        self._finished = False  # nothing more will be added to the list
        self._receiving = trio.CancelScope()
        self._writing = trio.CancelScope()

    async def run(self) -> None:
        """Greet, serve, and return when all is said."""
        self._put(session.greeting(self._server.version))
        try:
            async with trio.open_nursery() as writing:
                writing.start_soon(self._write)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._execute)
                self._finish()
        finally:
            while (fd := self.take_descriptor()) is not None:
                os.close(fd)
        _discard_input(self._stream)

    def announce(self, line: bytes) -> None:
        """Send an event, if the client has come that far."""
        if not self._session.negotiated or self._finished:
            return
        self._put(line)
        if self._unsent_bytes > UNSENT_LIMIT and not self._dropped:
            log.warning("a control client does not read its events; dropping it")
            self._drop()

    def close(self) -> None:
        """Execute nothing more, send what there is, and end."""
        self._closing = True
        self._receiving.cancel()
        if self._finished:
            self._writing.deadline = trio.current_time() + FLUSH_SECONDS
        self._changed.unpark_all()

    # -- reading

    async def _read(self) -> None:
        while not self._over:
            for step in self._session.out_of_band():
                await self._until(self._may_answer)
                await self._answer(step)
            self._changed.unpark_all()
            with trio.CancelScope() as self._receiving:
                await self._take_in()

    async def _take_in(self) -> None:
        """Wait for what lets reading go on: bytes, or a request that finished."""
        if self._over:
            return
        if self._end_of_input or not self._session.wants_data:
            await self._changed.park()
            return
        if not self._received:
            self._received = await self._receive()
            self._end_of_input = not self._received
        if self._received:
            async with self._server.parsing.turn(self._parsed):
                self._parse()
        self._changed.unpark_all()

    def _parse(self) -> None:
        """What fits into the queue, and into a moment."""
        data, at = self._received, 0
        end = time.monotonic() + PARSE_SECONDS
        while at < len(data) and self._session.wants_data and time.monotonic() < end:
            self._session.feed(data[at : at + PIECE_BYTES])
            at += PIECE_BYTES
        self._received = data[at:]

    async def _receive(self) -> bytes:
        """Bytes, nothing at the end; keeps the descriptors that came with them."""
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)
        try:
            data, ancillary, _, _ = await self._stream.socket.recvmsg(
                RECEIVE_BYTES, room, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return b""
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % _INT_BYTES
                self._descriptors.extend(array.array("i", content[:whole]))
        while len(self._descriptors) > MAX_DESCRIPTORS:
            os.close(self._descriptors.popleft())
        return data

    def take_descriptor(self) -> int | None:
        return self._descriptors.popleft() if self._descriptors else None

    @property
    def _over(self) -> bool:
        """Whether there is no further request to come, or none is wanted."""
        done = self._end_of_input and not self._session.pending
        return self._closing or done

    # -- executing

    async def _execute(self) -> None:
        while True:
            await self._until(lambda: self._over or self._session.ready)
            await self._until(self._may_answer)
            if self._over:
                return
            async with self._server.executing.turn(self._executed):
                step = None if self._gone() else self._session.in_band()
                if step is None:
                    return
                self._server.in_turn = self
                await self._answer(step)
            self._session.finish()
            self._changed.unpark_all()

    async def _answer(self, step: Step) -> None:
        # Nothing may come between the reply to qmp_capabilities and the step
        # that made it, or an event would overtake the reply.
        if isinstance(step, Call):
            self._put(await self._server.execute(step))
        else:
            self._put(step.line)

    def _may_answer(self) -> bool:
        return self._over or self._unsent_bytes < UNSENT_PAUSE

    def _gone(self) -> bool:
        """Whether nothing more is to be executed, after waiting for the turn.

        A client that has vanished, not just stopped writing, is found out here;
        its queued requests are forgotten.
        """
        if _is_hung_up(self._stream):
            self._drop()
        return self._closing

    # -- writing

    def _put(self, line: bytes) -> None:
        if not self._dropped:
            self._unsent.append(line)
            self._unsent_bytes += len(line)
            self._changed.unpark_all()

    async def _write(self) -> None:
        with self._writing:
            try:
                await self._send_until_finished()
            except trio.BrokenResourceError:
                self._drop()

    async def _send_until_finished(self) -> None:
        while True:
            await self._until(lambda: self._finished or bool(self._unsent))
            if not self._unsent:
                return
            data = b"".join(self._unsent)
            self._unsent.clear()
            await self._stream.send_all(data)
            self._unsent_bytes -= len(data)
            self._changed.unpark_all()

    # -- ending

    def _drop(self) -> None:
        """Give the client up, without waiting for anything."""
        self._dropped = True
        self._unsent.clear()
        self.close()
        # Wakes the task that is sending, or the client that is receiving.
        with suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)

    def _finish(self) -> None:
        self._finished = True
        if self._closing:
            self.close()
        self._changed.unpark_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.park()


def _is_hung_up(stream: trio.SocketStream) -> bool:
    """Both directions are shut; a client that only stopped writing is not gone."""
    poller = poll()
    poller.register(stream.socket.fileno(), 0)  # POLLHUP is always reported
    return any(events & POLLHUP for _, events in poller.poll(0))


def _discard_input(stream: trio.SocketStream) -> None:
    """Throw away what was sent behind the last request that counted.

    A unix socket closed with unread bytes gives its peer ECONNRESET instead of
    an end of file. Its queue is smaller than one such read.
    """
    with suppress(OSError), socket.socket(fileno=os.dup(stream.socket.fileno())) as raw:
        raw.setblocking(False)
        raw.recv(1 << 20)


_INT_BYTES: Final = array.array("i").itemsize


# --- the socket in the file system -------------------------------------------


@contextmanager
def _bound_socket(path: str, group: int | None) -> Iterator[socket.socket]:
    """A listening socket at `path`, which is removed again if it is still ours."""
    _check_folder(os.path.dirname(path) or ".")
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        identity = _identity(path)
        try:
            # Nobody can connect before listen, so the mode is never too wide.
            if group is not None:
                os.chown(path, -1, group)
            os.chmod(path, SOCKET_MODE)
            sock.listen(BACKLOG)
            yield sock
        finally:
            if _identity(path) == identity:
                os.unlink(path)


def _check_folder(folder: str) -> None:
    """Whoever may write to the folder may put a socket of theirs in our place."""
    mode = os.stat(folder).st_mode
    if not mode & stat.S_IWOTH:
        return
    if not mode & stat.S_ISVTX:
        reason = "Everybody may replace a control socket there; chmod o-w"
        raise PermissionError(errno.EPERM, reason, folder)
    log.warning("everybody may write to %s; keep control sockets elsewhere", folder)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody serves; raise OSError if it is anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "Not a socket, and in the way", path)
    if _is_served(path):
        raise OSError(errno.EADDRINUSE, "Another process serves this socket", path)
    os.unlink(path)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full queue of clients also means served
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True
    return True
