"""Channels over sockets, files and commands; connecting and listening."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from common.address import Exec, File, Tcp, Unix
from common.channel import Channel, Listener, connect
from common.errors import ChannelLost, HostError
from common.stream import fields

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    channels = (Channel(one.detach(), "main"), Channel(other.detach(), "main"))
    yield channels
    for channel in channels:
        channel.close()


# --- bytes ------------------------------------------------------------------------


async def test_write_and_read(pair: Pair) -> None:
    one, other = pair
    data = os.urandom(3 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.write, data)
        got = await other.decode(lambda read: fields.take_untrusted(read, len(data)))
    assert got == data
    assert one.sent == other.received == len(data)


async def test_both_directions_at_once(pair: Pair) -> None:
    data = os.urandom(MIB)

    async def swap(channel: Channel) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.write, data)
            take = await channel.decode(lambda read: read(len(data)))
            assert take == data

    async with trio.open_nursery() as nursery:
        for channel in pair:
            nursery.start_soon(swap, channel)


async def test_decoder_errors_come_through(pair: Pair) -> None:
    one, other = pair
    await one.write(b"\1")

    def broken(read: fields.Read) -> int:
        raise ValueError(read(1))

    with pytest.raises(ValueError, match="1"):
        await other.decode(broken)


async def test_peer_closes(pair: Pair) -> None:
    one, other = pair
    assert not other.hung_up()
    await one.write(b"last")
    one.break_connection()
    assert other.hung_up()
    assert await other.decode(lambda read: read(4)) == b"last"
    with pytest.raises(ChannelLost) as error:
        await other.decode(lambda read: read(1))
    assert error.value.errno is None
    with pytest.raises(ChannelLost):
        await other.write(b"x" * MIB)


async def test_at_end(pair: Pair) -> None:
    one, other = pair
    await one.write(b"x")
    assert not await other.at_end()
    await other.decode(lambda read: read(1))
    one.break_connection()
    assert await other.at_end()


async def test_shutdown_ends_what_waits(pair: Pair) -> None:
    one, _ = pair
    lost = []

    async def read() -> None:
        with pytest.raises(ChannelLost) as error:
            await one.decode(lambda read: read(1))
        lost.append(str(error.value))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        one.shutdown()
    assert len(lost) == 1


async def test_cancelled_read_gives_the_thread_back(pair: Pair) -> None:
    one, _ = pair
    with trio.move_on_after(0.05) as scope:
        await one.decode(lambda read: read(1))
    assert scope.cancelled_caught


async def test_cancelled_write_to_a_peer_that_does_not_read(pair: Pair) -> None:
    one, _ = pair
    with trio.move_on_after(0.05) as scope:
        await one.write(bytes(64 * MIB))
    assert scope.cancelled_caught


async def test_drain_waits_for_the_peer(pair: Pair) -> None:
    """What is unread when a socket is closed would take what was sent along."""
    one, other = pair
    await other.write(b"never read")
    await one.write(b"last words")
    said = []

    async def listen() -> None:
        said.append(await other.decode(lambda read: read(10)))
        assert await other.at_end()
        other.break_connection()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await one.drain()
    assert said == [b"last words"]


async def test_drain_from_a_peer_that_stays(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.channel.DRAIN_SECONDS", 0.05)
    one, other = pair
    await one.drain()
    assert not one.hung_up()
    assert other.hung_up()


# --- connecting -----------------------------------------------------------------------


async def test_connect_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "nobody")
    with pytest.raises(ChannelLost) as error:
        await connect(Unix(path), "main")
    text = f"Failed to connect to '{path}': No such file or directory"
    assert str(error.value) == text
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
        with pytest.raises(ChannelLost) as error:
            await connect(Tcp("127.0.0.1", port), "main")
    text = f"Failed to connect to '127.0.0.1:{port}': Connection refused"
    assert str(error.value) == text


@pytest.mark.parametrize(
    "address",
    [
        Tcp("no-such-host.invalid", "1"),
        Tcp("a" * 64 + ".invalid", "1"),
        Tcp("..", "1"),
        Tcp("127.0.0.1", "no-such-service"),
        Unix("x" * 200),
        Unix("x" * 5000),
    ],
)
async def test_connect_to_nonsense(address: Tcp | Unix) -> None:
    with pytest.raises(ChannelLost, match="Failed to connect to '"):
        await connect(address, "main")
    with pytest.raises(HostError, match="Failed to bind socket to "):
        await Listener(address).open()


async def test_file(tmp_path: Path) -> None:
    path = str(tmp_path / "stream")
    out = await connect(File(path), "main")
    await out.write(b"0123456789")
    await out.finish()
    out.close()
    listener = Listener(File(path, 4))
    await listener.open()
    assert not listener.many
    assert listener.describe() == []
    channel = await listener.accept("main")
    assert await channel.decode(lambda read: read(6)) == b"456789"
    assert await channel.at_end()
    channel.close()
    listener.close()


async def test_file_that_cannot_be(tmp_path: Path) -> None:
    path = str(tmp_path / "no" / "file")
    with pytest.raises(HostError) as error:
        await connect(File(path), "main")
    assert str(error.value) == f"Could not create '{path}': No such file or directory"
    with pytest.raises(HostError) as error:
        await Listener(File(path)).open()
    assert str(error.value) == f"Could not open '{path}': No such file or directory"


async def test_command(tmp_path: Path) -> None:
    path = tmp_path / "out"
    channel = await connect(Exec(("/bin/sh", "-c", f"cat >{path}")), "main")
    await channel.write(b"through a pipe")
    await channel.finish()
    channel.close()
    assert path.read_bytes() == b"through a pipe"
    with pytest.raises(HostError, match="Could not run '/no/program'"):
        await connect(Exec(("/no/program",)), "main")


async def test_command_that_fails() -> None:
    channel = await connect(Exec(("/bin/sh", "-c", "cat >&2; exit 3")), "main")
    with pytest.raises(HostError, match="status 3"):
        await channel.finish()
    channel.close()


# --- listening ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_listen(tmp_path: Path, family: str) -> None:
    path = str(tmp_path / "socket")
    listener = Listener(Tcp("127.0.0.1", "0") if family == "tcp" else Unix(path))
    await listener.open()
    assert listener.many
    (found,) = listener.describe()
    if family == "tcp":
        port = found["port"]
        assert isinstance(port, str)
        assert found == {
            "type": "inet",
            "host": "127.0.0.1",
            "port": port,
            "ipv4": True,
        }
        address: Tcp | Unix = Tcp("127.0.0.1", port)
    else:
        assert found == {"type": "unix", "path": path}
        address = Unix(path)
    for name in ("main", "preempt"):
        one = await connect(address, name)
        other = await listener.accept(name)
        await one.write(name.encode())
        assert await other.decode(lambda read: read(4)) == name.encode()[:4]
        one.close()
        other.close()
    listener.close()
    with pytest.raises(ChannelLost, match="No such file"):
        await connect(Unix(path), "main")


async def test_listen_on_all_addresses() -> None:
    listener = Listener(Tcp("", "0"))
    await listener.open()
    for found in listener.describe():
        channel = await connect(Tcp(str(found["host"]), str(found["port"])), "main")
        (await listener.accept("main")).close()
        channel.close()
    listener.close()


async def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    listener = Listener(Unix(path))
    await listener.open()
    (await connect(Unix(path), "main")).close()
    listener.close()


async def test_listen_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "no" / "socket")
    with pytest.raises(HostError) as error:
        await Listener(Unix(path)).open()
    assert (
        str(error.value)
        == f"Failed to bind socket to {path}: No such file or directory"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(HostError, match="Address already in use"):
            await Listener(Tcp("127.0.0.1", port)).open()


async def test_cancelled_accept(tmp_path: Path) -> None:
    listener = Listener(Unix(str(tmp_path / "socket")))
    await listener.open()
    with trio.move_on_after(0.01) as scope:
        await listener.accept("main")
    assert scope.cancelled_caught
    listener.close()
    with suppress(HostError):
        await listener.open()
    listener.close()
