"""The blocking client, against the server and against servers that misbehave."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import pytest
import trio

from common.qmp.client import CommandFailed, QmpClient
from common.qmp.server import QmpServer

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
NEGOTIATED = b'{"return": {}, "id": 1}\r\n'
STOP = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}}\r\n'


@contextmanager
def scripted(path, *answers: bytes):
    """A server that sends its lines at once, reads nothing, and stays open."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"".join(answers))
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


async def with_client(tmp_path, use, *, oob=False):
    """Run `use(client)` in a thread against a real server; return its result."""
    path = tmp_path / "qmp.sock"

    async def stop(arguments):
        server.event("STOP")
        server.event("MIGRATION", {"status": "active"})
        server.event("MIGRATION", {"status": "completed"})

    async def recover(arguments):
        return arguments

    async def quit_(arguments):
        server.close()

    handlers = {"stop": stop, "migrate-recover": recover, "quit": quit_}
    server = QmpServer(handlers)

    def run():
        with QmpClient(path, oob=oob, timeout=20) as client:
            return use(client)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.listen, path)
        result = await trio.to_thread.run_sync(run)
        await server.stop()
    return result


async def test_execute(tmp_path):
    def use(client):
        assert client.greeting["QMP"]["capabilities"] == ["oob"]
        assert client.execute("stop") == {}
        return client.execute("migrate-recover", {"uri": "tcp::0"})

    assert await with_client(tmp_path, use) == {"uri": "tcp::0"}


async def test_errors_carry_class_and_text(tmp_path):
    def use(client):
        with pytest.raises(CommandFailed) as caught:
            client.execute("nope")
        return caught.value.error_class, caught.value.desc

    cls, desc = await with_client(tmp_path, use)
    assert cls == "CommandNotFound"
    assert desc == "The command nope has not been found"


async def test_events_are_kept_and_matched(tmp_path):
    def use(client):
        client.execute("stop")
        completed = client.wait_event("MIGRATION", status="completed")
        assert completed["data"] == {"status": "completed"}
        left = [event["event"] for event in client.events()]
        assert client.events() == []
        client.execute("stop")
        assert client.wait_event("STOP")["event"] == "STOP"
        return left

    assert await with_client(tmp_path, use) == ["STOP", "MIGRATION"]


async def test_out_of_band(tmp_path):
    def use(client):
        return client.execute_oob("migrate-recover", {"uri": "x"})

    assert await with_client(tmp_path, use, oob=True) == {"uri": "x"}


async def test_an_event_that_does_not_come(tmp_path):
    def use(client):
        with pytest.raises(TimeoutError):
            client.wait_event("STOP", timeout=0.01)
        return client.execute("stop")  # the connection is still good

    assert await with_client(tmp_path, use) == {}


async def test_after_quit_there_is_an_end(tmp_path):
    def use(client):
        assert client.execute("quit") == {}
        with pytest.raises(EOFError):
            client.wait_event("SHUTDOWN")
        return True

    assert await with_client(tmp_path, use)


def test_nobody_listens(tmp_path):
    with pytest.raises(FileNotFoundError):
        QmpClient(tmp_path / "qmp.sock")


def test_a_server_that_closes_after_the_greeting(tmp_path):
    path = tmp_path / "qmp.sock"
    with scripted(path, GREETING), pytest.raises(EOFError):
        QmpClient(path)


def test_a_server_that_speaks_no_json(tmp_path):
    path = tmp_path / "qmp.sock"
    with scripted(path, b"SSH-2.0\r\n"), pytest.raises(ValueError, match="not JSON"):
        QmpClient(path)


def test_a_late_reply_is_not_taken_for_the_next_one(tmp_path):
    path = tmp_path / "qmp.sock"
    late = b'{"return": "late", "id": 2}\r\n'
    mine = b'{"return": "mine", "id": 3}\r\n'
    with (
        scripted(path, GREETING, NEGOTIATED, STOP, late, STOP, mine),
        QmpClient(path) as client,
    ):
        client._last_id = 2  # as after a command that timed out
        assert client.execute("query-status") == "mine"
        assert len(client.events()) == 2


@pytest.mark.parametrize("text", [b"[]", b"1", b'"QMP"', b"null"])
def test_json_that_is_no_message(tmp_path, text):
    """Whether it comes as the greeting, or where an answer belongs."""
    for number, before in enumerate((b"", GREETING)):
        path = tmp_path / str(number)
        with (
            scripted(path, before, text + b"\r\n"),
            pytest.raises(ValueError, match="no message of QMP"),
            QmpClient(path, timeout=20),
        ):
            pass
