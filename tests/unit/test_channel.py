"""Channels over sockets, files and commands; connecting and listening."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from common.address import Address, Exec, Fd, File, Tcp, Unix, Vsock
from common.channel import Channel, Listener, connect
from common.errors import ChannelLost, HostError
from common.stream import fields

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
VSOCK_PORT = 47223
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
    ("address", "text"),
    [
        (Tcp("no-such-host.invalid", "1"), "address resolution failed for no-such"),
        (Tcp("no-such-host.invalid", "1", ipv6=False), "address resolution failed"),
        (Tcp("a" * 64 + ".invalid", "1"), "address resolution failed for a"),
        (Tcp("..", "1"), "address resolution failed for ..:1: "),
        (Tcp("127.0.0.1", "no-such-service"), "address resolution failed for "),
        (Tcp("::1", "1", ipv6=False), "address resolution failed for "),
        (Unix("x" * 200), f"UNIX socket path '{'x' * 200}' is too long"),
        (Unix("x" * 5000), "UNIX socket path 'x"),
        (Fd("gone"), "File descriptor named 'gone' has not been found"),
    ],
)
async def test_connect_to_nonsense(address: Address, text: str) -> None:
    with pytest.raises((ChannelLost, HostError)) as error:
        await connect(address, "main")
    assert "Failed to connect to '" in str(error.value) or isinstance(address, Fd)
    with pytest.raises(HostError) as refused:
        await Listener(address).open()
    assert str(refused.value).startswith(text)


async def exchange(listener: Listener, address: Address) -> None:
    """One channel from a connect to an accept, and a byte over it."""
    accepted: list[Channel] = []

    async def accept() -> None:
        accepted.append(await listener.accept("main"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        one = await connect(address, "main")
    (other,) = accepted
    await one.write(b"x")
    assert await other.decode(lambda read: read(1)) == b"x"
    for channel in (one, other):
        channel.close()
    listener.close()


@pytest.mark.parametrize(
    ("listen", "family"),
    [
        (Tcp("", "0", ipv6=False), "ipv4"),
        (Tcp("", "0", ipv4=False), "ipv6"),
        (Tcp("127.0.0.1", "0"), "ipv4"),
        (Tcp("::1", "0"), "ipv6"),
        (Tcp("localhost", "0", ipv6=False), "ipv4"),
    ],
)
async def test_one_family(listen: Tcp, family: str) -> None:
    listener = Listener(listen)
    await listener.open()
    (found,) = listener.describe()
    assert found[family] is True
    host = {"ipv4": "127.0.0.1", "ipv6": "::1"}[family]
    await exchange(listener, Tcp(host, str(found["port"]), keep_alive=True))


async def test_the_first_free_port() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        taken = sock.getsockname()[1]
        with pytest.raises(HostError, match="Address already in use"):
            await Listener(Tcp("127.0.0.1", str(taken))).open()
        listener = Listener(Tcp("127.0.0.1", str(taken), to=taken + 9))
        await listener.open()
    (found,) = listener.describe()
    assert taken < int(str(found["port"])) <= taken + 9
    listener.close()


async def test_abstract_unix_socket() -> None:
    address = Unix(f"postcopyd-test-{os.getpid()}", abstract=True)
    listener = Listener(address)
    await listener.open()
    assert listener.describe() == [
        {"type": "unix", "path": address.path, "abstract": True}
    ]
    assert listener.many
    await exchange(listener, address)
    assert address.path not in os.listdir()


async def test_descriptors_that_were_given() -> None:
    one, other = socket.socketpair()
    listener = Listener(Fd("in", other.detach()))
    await listener.open()
    assert not listener.many
    assert listener.describe() == []
    await exchange(listener, Fd("out", one.detach()))


async def test_vsock() -> None:
    """Between processes of one machine it needs the module vsock_loopback."""
    address = Vsock("1", str(VSOCK_PORT))
    listener = Listener(Vsock(str(socket.VMADDR_CID_ANY), str(VSOCK_PORT)))
    try:
        await listener.open()
    except HostError as error:
        pytest.skip(f"vsock: {error}")
    assert listener.describe() == [
        {"type": "vsock", "cid": str(socket.VMADDR_CID_ANY), "port": str(VSOCK_PORT)}
    ]
    if "vsock_loopback" not in os.listdir("/sys/module"):
        with pytest.raises(ChannelLost, match="Failed to connect to '1:"):
            await connect(address, "main")
        listener.close()
        return
    await exchange(listener, address)


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


# --- congestion control -----------------------------------------------------------


async def test_congestion_control_is_chosen() -> None:
    listener = Listener(Tcp("127.0.0.1", "0"))
    await listener.open()
    [bound] = listener.describe()
    there = Tcp("127.0.0.1", str(bound["port"]))
    channel = await connect(there, "main", congestion="reno")
    with socket.socket(fileno=os.dup(channel.native.fd)) as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert name.rstrip(b"\0") == b"reno"
    channel.close()
    with pytest.raises(ChannelLost, match=r"'nonsense'.*tcp_allowed"):
        await connect(there, "main", congestion="nonsense")
    listener.close()


# --- a peer that is silent -----------------------------------------------------------


def silence_bounds(fd: int) -> tuple[int, ...]:
    """Keepalive on or off, its times in seconds, the user timeout in ms."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return (
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        )


@pytest.mark.parametrize(
    ("seconds", "bounds"), [(10, (1, 3, 3, 3, 10_000)), (1, (1, 1, 1, 3, 1_000))]
)
async def test_both_ends_bound_silence(seconds: int, bounds: tuple[int, ...]) -> None:
    listener = Listener(Tcp("127.0.0.1", "0"), peer_timeout=seconds)
    await listener.open()
    there = Tcp("127.0.0.1", str(listener.describe()[0]["port"]))
    one = await connect(there, "main", peer_timeout=seconds)
    other = await listener.accept("main")
    for channel in (one, other):
        assert silence_bounds(channel.fd) == bounds
        channel.close()
    usual = await connect(there, "main")
    assert silence_bounds(usual.fd)[0] == silence_bounds(usual.fd)[-1] == 0
    usual.close()
    listener.close()


# --- listening somewhere else ------------------------------------------------------


async def test_where_a_listener_is(tmp_path: Path) -> None:
    listener = Listener(Tcp("localhost", "0", ipv6=False))
    assert not listener.is_at(listener.address), "nobody can come in yet"
    await listener.open()
    port = str(listener.describe()[0]["port"])
    assert listener.is_at(Tcp("127.0.0.1", port))
    assert not listener.is_at(Tcp("127.0.0.1", "1"))
    assert not listener.is_at(listener.address), "port 0 is another one each time"
    listener.close()
    listener = Listener(Unix(str(tmp_path / "socket")))
    await listener.open()
    assert listener.is_at(Unix(str(tmp_path / "socket")))
    assert not listener.is_at(Unix(str(tmp_path / "other")))
    listener.close()


async def test_a_listener_leaves_the_path_to_its_successor(tmp_path: Path) -> None:
    path = Unix(str(tmp_path / "socket"))
    first, second = Listener(path), Listener(path)
    await first.open()
    await second.open()
    first.close()
    await exchange(second, path)
    second.close()
    assert not (tmp_path / "socket").exists()


async def test_nobody_comes_to_a_used_descriptor(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, other = socket.socketpair()
    listener = Listener(Fd("in", other.detach()))
    await listener.open()
    (await listener.accept("main")).close()
    with trio.move_on_after(60) as scope:
        await listener.accept("main")
    assert scope.cancelled_caught
    one.close()
    listener.close()


async def test_what_is_looked_at_stays(pair: Pair) -> None:
    ours, theirs = pair
    await theirs.write(b"0123456789")
    assert (await ours.look(4)).startswith(b"0123")
    assert await ours.look(10) == b"0123456789"
    assert await ours.decode(lambda read: read(3)) == b"012"
    assert await ours.look(1) == b"3456789"
    theirs.shutdown()
    with pytest.raises(ChannelLost):
        await ours.look(8)


async def test_who_is_there() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as theirs:
        fd, (host, port) = listener.accept()
        channel = Channel(fd.detach(), "main")
        assert channel.peer() == f"{host} port {port}"
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
        theirs.close()
        with pytest.raises(ChannelLost):
            await channel.decode(lambda read: read(1))
        assert channel.peer() == "a connection that is gone"
        channel.close()
