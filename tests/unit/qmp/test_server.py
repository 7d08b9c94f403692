"""The server over real unix sockets, with clients of every temper."""

from __future__ import annotations

import json
import os
import socket
import stat
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from common.qmp import server as server_module
from common.qmp.server import QmpServer
from common.qmp.session import CommandError

SECONDS = 20  # for anything at all; a test that needs it has failed

NEGOTIATE = b'{"execute":"qmp_capabilities"}\n'
NEGOTIATE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


class Monitor:
    """The raw end of a connection: bytes out, one JSON line in."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, *requests: bytes | dict) -> None:
        texts = [
            r if isinstance(r, bytes) else json.dumps(r).encode() for r in requests
        ]
        await self.stream.send_all(b"".join(texts))

    async def line(self):
        """The next message, or None at the end of file."""
        while b"\r\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                assert self._buffer == b""
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return json.loads(line)

    async def lines(self):
        """Everything up to the end of file."""
        return [line async for line in self._until_end()]

    async def _until_end(self):
        while (line := await self.line()) is not None:
            yield line

    async def call(self, name: str, **arguments):
        await self.send({"execute": name, "arguments": arguments})
        return await self.line()


@dataclass
class Guest:
    """Handlers that can be held in the middle of a command."""

    running: trio.Event = field(default_factory=trio.Event)
    release: trio.Event = field(default_factory=trio.Event)
    calls: list[str] = field(default_factory=list)
    server: QmpServer | None = None

    async def stop(self, arguments) -> None:
        """Emits STOP and returns nothing."""
        self.calls.append("stop")
        self.server.event("STOP")

    async def cont(self, arguments) -> None:
        """Runs until released."""
        self.calls.append("cont")
        self.running.set()
        await self.release.wait()
        self.calls.append("cont done")

    async def pause(self, arguments) -> None:
        self.calls.append("pause")

    async def status(self, arguments):
        self.calls.append("status")
        return {"status": "running", "running": True}

    async def name(self, arguments):
        raise CommandError("no name", "DeviceNotFound")

    async def uuid(self, arguments):
        raise KeyError("a fault of ours")

    async def recover(self, arguments):
        return arguments

    async def quit(self, arguments) -> None:
        self.server.event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.server.close()

    def handlers(self):
        return {
            "stop": self.stop,
            "cont": self.cont,
            "migrate-pause": self.pause,
            "query-status": self.status,
            "query-name": self.name,
            "query-uuid": self.uuid,
            "migrate-recover": self.recover,
            "quit": self.quit,
        }


@dataclass
class Running:
    """A served guest and the way to its socket."""

    guest: Guest
    server: QmpServer
    path: str
    monitors: list[Monitor] = field(default_factory=list)

    async def open(self, path: str | None = None) -> Monitor:
        """A connection that nothing has been read from."""
        monitor = Monitor(await trio.open_unix_socket(path or self.path))
        self.monitors.append(monitor)
        return monitor

    async def connect(self, path: str | None = None) -> Monitor:
        """A connection whose greeting has been read."""
        monitor = await self.open(path)
        assert "QMP" in await monitor.line()
        return monitor

    async def negotiated(self, path: str | None = None, *, oob=False) -> Monitor:
        """A connection in command mode."""
        monitor = await self.connect(path)
        await monitor.send(NEGOTIATE_OOB if oob else NEGOTIATE)
        assert await monitor.line() == {"return": {}}
        return monitor


@asynccontextmanager
async def serving(directory):
    """A server on a socket in `directory`, stopped at the end."""
    guest = Guest()
    guest.server = QmpServer(guest.handlers(), package="test")
    path = str(directory / "qmp.sock")
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(guest.server.listen, path)
            running = Running(guest, guest.server, path)
            yield running
            guest.release.set()
            await guest.server.stop()
            for monitor in running.monitors:
                await monitor.stream.aclose()
    assert list(directory.iterdir()) == []


async def test_greeting_comes_first(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.open()
        version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "test"}
        assert await monitor.line() == {
            "QMP": {"version": version, "capabilities": ["oob"]}
        }
        await monitor.send(NEGOTIATE)
        assert await monitor.line() == {"return": {}}
        assert await monitor.call("query-version") == {"return": version}


async def test_commands_and_schema_list_the_same(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        commands = (await monitor.call("query-commands"))["return"]
        entities = (await monitor.call("query-qmp-schema"))["return"]
        names = {command["name"] for command in commands}
        assert names == {e["name"] for e in entities if e["meta-type"] == "command"}
        assert {"qmp_capabilities", "query-commands", "stop", "migrate_pause"} <= names
        assert "migrate" not in names


async def test_results_and_errors(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        recovered = await monitor.call("migrate-recover", uri="tcp:\u00e9:0")
        assert recovered == {"return": {"uri": "tcp:\u00e9:0"}}
        refused = await monitor.call("query-name")
        assert refused["error"] == {"class": "DeviceNotFound", "desc": "no name"}


async def test_a_fault_in_a_handler_is_logged_and_answered(tmp_path, caplog):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        failed = await monitor.call("query-uuid")
        assert failed["error"]["class"] == "GenericError"
        assert "internal error" in failed["error"]["desc"]
        assert (await monitor.call("query-status"))["return"]["running"]
    assert "a fault of ours" in caplog.text


async def test_requests_cut_anywhere(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.connect()
        for byte in NEGOTIATE + b"{'execute':'query-status'}":
            await monitor.send(bytes([byte]))
        assert await monitor.line() == {"return": {}}
        assert (await monitor.line())["return"]["status"] == "running"


async def test_a_reply_larger_than_the_limit_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "UNSENT_LIMIT", 1 << 17)
    monkeypatch.setattr(server_module, "UNSENT_PAUSE", 1 << 16)
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        large = "x" * (3 * server_module.UNSENT_LIMIT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor.send, {"execute": "query-status", "id": large})
            reply = await monitor.line()
        assert reply["id"] == large


# --- half-closing, pipelining, vanishing ---


async def test_half_close_gets_every_reply(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.open()
        await monitor.send(NEGOTIATE, *[{"execute": "query-status"}] * 50, b"null")
        await monitor.stream.send_eof()
        lines = await monitor.lines()
        assert [next(iter(line)) for line in lines] == ["QMP"] + ["return"] * 51


async def test_half_close_during_a_command(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        await monitor.send({"execute": "cont"}, {"execute": "query-status"})
        await monitor.stream.send_eof()
        await running.guest.running.wait()
        running.guest.release.set()
        assert [next(iter(line)) for line in await monitor.lines()] == ["return"] * 2


async def test_vanishing_drops_what_was_queued(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        await monitor.send({"execute": "cont"}, {"execute": "query-status"})
        await running.guest.running.wait()
        await monitor.stream.aclose()
        running.guest.release.set()
        other = await running.negotiated()
        await other.call("query-status")
        assert running.guest.calls == ["cont", "cont done", "status"]


@pytest.mark.parametrize("sent", [b"", b'{"exec', NEGOTIATE, NEGOTIATE * 3 + b"{"])
async def test_vanishing_is_harmless(tmp_path, sent):
    async with serving(tmp_path) as running:
        for _ in range(20):
            stream = await trio.open_unix_socket(running.path)
            if sent:
                await stream.send_all(sent)
            await stream.aclose()
        assert await (await running.negotiated()).call("migrate-pause") == {
            "return": {}
        }


async def test_a_new_connection_starts_from_scratch(tmp_path):
    async with serving(tmp_path) as running:
        first = await running.negotiated(oob=True)
        await first.send(b'{"execute":"que')
        await first.stream.aclose()
        second = await running.connect()
        refused = await second.call("query-status")
        assert refused["error"]["class"] == "CommandNotFound"


# --- several clients, order, out-of-band ---


async def test_in_band_commands_of_all_clients_take_turns(tmp_path):
    async with serving(tmp_path) as running:
        first, second = await running.negotiated(), await running.negotiated()
        await first.send({"execute": "cont"})
        await running.guest.running.wait()
        await second.send({"execute": "query-status"})
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert running.guest.calls == ["cont"]
        running.guest.release.set()
        assert await first.line() == {"return": {}}
        assert (await second.line())["return"]["running"]


async def test_out_of_band_while_a_command_runs(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated(oob=True)
        await monitor.send(
            {"execute": "cont", "id": 1},
            {"execute": "query-status", "id": 2},
            {"exec-oob": "migrate-pause", "id": 3},
        )
        assert await monitor.line() == {"return": {}, "id": 3}
        running.guest.release.set()
        assert (await monitor.line())["id"] == 1
        assert (await monitor.line())["id"] == 2


async def test_out_of_band_behind_a_full_queue(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated(oob=True)
        queued = [{"execute": "cont", "id": n} for n in range(8)]
        await monitor.send(*queued, {"exec-oob": "migrate-pause", "id": 99})
        await running.guest.running.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert running.guest.calls == ["cont"]
        running.guest.release.set()
        ids = [(await monitor.line())["id"] for _ in range(9)]
        assert sorted(ids) == [*range(8), 99]
        assert [i for i in ids if i != 99] == list(range(8))


# --- events ---


async def test_events_reach_every_negotiated_client(tmp_path):
    async with serving(tmp_path) as running:
        fresh = await running.connect()
        others = [await running.negotiated() for _ in range(3)]
        running.server.event("MIGRATION", {"status": "setup"})
        for monitor in others:
            event = await monitor.line()
            assert event["event"] == "MIGRATION"
            assert event["data"] == {"status": "setup"}
            assert set(event["timestamp"]) == {"seconds", "microseconds"}
        await fresh.send(NEGOTIATE)
        assert await fresh.line() == {"return": {}}


async def test_an_event_comes_before_the_reply_of_its_command(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        event = await monitor.call("stop")
        assert event["event"] == "STOP"
        assert "data" not in event
        assert await monitor.line() == {"return": {}}


async def test_events_must_be_in_the_schema(tmp_path):
    async with serving(tmp_path) as running:
        with pytest.raises(KeyError):
            running.server.event("NO_SUCH_EVENT")
        with pytest.raises(CommandError, match="status"):
            running.server.event("MIGRATION", {"status": "nonsense"})


# --- clients that do not read ---


async def test_a_client_that_never_reads_is_dropped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "UNSENT_LIMIT", 1 << 16)
    async with serving(tmp_path) as running:
        deaf, reader = await running.negotiated(), await running.negotiated()
        kernel_buffer = 1 << 20  # more than any unix socket holds
        sent = 0
        while sent < kernel_buffer:
            for _ in range(100):
                running.server.event("MIGRATION", {"status": "active"})
            for _ in range(100):
                sent += len(json.dumps(await reader.line()))
        assert "does not read" in caplog.text
        assert len(await deaf.stream.receive_some(sent)) < sent
        assert (await reader.call("query-status"))["return"]["running"]


async def test_a_client_that_does_not_read_its_replies_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "UNSENT_PAUSE", 1 << 16)
    requests = 500  # with replies of several kilobytes each
    async with serving(tmp_path) as running, trio.open_nursery() as nursery:
        late = await running.negotiated()
        request = {"execute": "query-qmp-schema"}
        nursery.start_soon(late.send, *[request] * requests)
        await trio.testing.wait_all_tasks_blocked(0.01)
        [connection] = running.server._connections
        assert (1 << 16) <= connection._unsent_bytes < (2 << 16)
        reader = await running.negotiated()
        assert (await reader.call("query-status"))["return"]["running"]
        for _ in range(requests):
            assert (await late.line())["return"][0]["meta-type"] == "command"


# --- the end ---


async def test_quit(tmp_path):
    async with serving(tmp_path) as running:
        quitter, bystander = await running.negotiated(), await running.negotiated()
        await quitter.send({"execute": "quit"}, *[{"execute": "query-status"}] * 5)
        kinds = [next(iter(line)) for line in await quitter.lines()]
        assert kinds == ["event", "return"]
        assert [line["event"] for line in await bystander.lines()] == ["SHUTDOWN"]
        with pytest.raises(FileNotFoundError):
            await trio.open_unix_socket(running.path)


async def test_stop_finishes_the_running_command(tmp_path):
    async with serving(tmp_path) as running:
        monitor = await running.negotiated()
        await monitor.send({"execute": "cont"})
        await running.guest.running.wait()
        running.server.close()
        running.guest.release.set()
        assert await monitor.lines() == [{"return": {}}]


async def test_stop_does_not_wait_for_the_deaf(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "FLUSH_SECONDS", 0.05)
    async with serving(tmp_path) as running:
        deaf = await running.negotiated()
        for _ in range(5000):
            running.server.event("MIGRATION", {"status": "active"})
        await trio.testing.wait_all_tasks_blocked(0.01)
        await running.server.stop()
        await deaf.stream.aclose()


async def test_cancelling_removes_the_socket(tmp_path):
    server = QmpServer({})
    path = tmp_path / "qmp.sock"
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.listen, path)
            stream = await trio.open_unix_socket(str(path))
            nursery.cancel_scope.cancel()
        async with stream:
            pass
    assert not path.exists()


# --- the socket in the file system ---


async def test_mode_and_a_second_socket(tmp_path):
    async with serving(tmp_path) as running:
        assert stat.S_IMODE(os.stat(running.path).st_mode) == 0o660
        async with trio.open_nursery() as nursery:
            other = tmp_path / "other.sock"
            await nursery.start(running.server.listen, other)
            for monitor in (
                await running.negotiated(),
                await running.negotiated(str(other)),
            ):
                assert await monitor.call("migrate-pause") == {"return": {}}
            running.server.event("STOP")
            for monitor in running.monitors:
                assert (await monitor.line())["event"] == "STOP"
            running.server.close()


async def test_an_inherited_listening_socket(tmp_path):
    path = tmp_path / "inherited.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        server = QmpServer({})
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, sock)
                async with await trio.open_unix_socket(str(path)) as stream:
                    assert b"QMP" in await stream.receive_some()
                await server.stop()
    assert path.exists()


async def test_a_stale_socket_is_replaced(tmp_path):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "qmp.sock"))
    async with serving(tmp_path) as running:
        await running.negotiated()


async def test_a_live_socket_is_refused(tmp_path):
    async with serving(tmp_path) as running:
        with pytest.raises(OSError, match="Another process serves"):
            await QmpServer({}).listen(running.path)
        assert (await (await running.negotiated()).call("query-status"))["return"]


async def test_a_file_in_the_way_is_kept(tmp_path):
    path = tmp_path / "qmp.sock"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        await QmpServer({}).listen(path)
    assert path.read_text() == "precious"


async def test_somebody_elses_socket_is_not_removed(tmp_path):
    path = tmp_path / "qmp.sock"
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            server = QmpServer({})
            await nursery.start(server.listen, path)
            path.unlink()
            path.write_text("theirs")
            await server.stop()
    assert path.read_text() == "theirs"


def test_a_handler_without_a_schema():
    with pytest.raises(ValueError, match="nonsense"):
        QmpServer({"nonsense": Guest().stop})
