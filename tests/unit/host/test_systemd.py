"""Notifications against a socket that a manager would have; descriptors it gives."""

from __future__ import annotations

import array
import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from common.host import systemd
from common.host.heartbeat import beat
from common.host.systemd import Notifier, Passed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Manager:
    """The receiving end of `$NOTIFY_SOCKET`."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.setblocking(False)
        self.notifier = Notifier({"NOTIFY_SOCKET": address})

    def received(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found

    def received_with_descriptors(self) -> tuple[str, list[int]]:
        data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(64))
        ((_, kind, content),) = ancillary
        assert kind == socket.SCM_RIGHTS
        return data.decode(), list(array.array("i", content))


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, private_dir: Path) -> Iterator[Manager]:
    abstract = request.param == "abstract"
    found = Manager(f"@postcopyd-{os.getpid()}" if abstract else f"{private_dir}/n")
    with found.socket:
        yield found


def test_a_life(manager: Manager) -> None:
    notifier = manager.notifier
    notifier.ready()
    notifier.alive()
    notifier.extend(1.5)
    notifier.stopping()
    assert manager.received() == [
        "READY=1",
        "WATCHDOG=1",
        "EXTEND_TIMEOUT_USEC=1500000",
        "STOPPING=1",
    ]


def test_reloading_says_since_when(manager: Manager) -> None:
    manager.notifier.reloading()
    ((first, second),) = [one.split("\n") for one in manager.received()]
    assert first == "RELOADING=1"
    assert second.removeprefix("MONOTONIC_USEC=").isdecimal()


def test_status_is_one_line_and_sent_when_it_changes(manager: Manager) -> None:
    for line in ("a\nREADY=1", "a READY=1", "b", "b", "a"):
        manager.notifier.status(line)
    assert manager.received() == ["STATUS=a READY=1", "STATUS=b", "STATUS=a"]


def test_storing_descriptors(manager: Manager) -> None:
    with socket.socket(socket.AF_UNIX) as kept:
        inode = os.fstat(kept.fileno()).st_ino
        manager.notifier.store("ram", [kept.fileno(), kept.fileno()])
    text, fds = manager.received_with_descriptors()
    assert text == "FDSTORE=1\nFDNAME=ram\nFDPOLL=0"
    assert [os.fstat(fd).st_ino for fd in fds] == [inode, inode]
    for fd in fds:
        os.close(fd)
    manager.notifier.discard("ram")
    assert manager.received() == ["FDSTOREREMOVE=1\nFDNAME=ram"]


@pytest.mark.parametrize("name", ["", "a:b", "a\nREADY=1", "ä", "x" * 256])
def test_names_that_would_break_the_message(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        Notifier({}).store(name, [])


def test_nobody_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({})
    notifier.ready()
    assert not notifier.heard
    assert caplog.records == []


def test_a_manager_that_is_gone_is_no_error(
    private_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Notifier({"NOTIFY_SOCKET": f"{private_dir}/gone"}).ready()
    assert "was not told READY=1: No such file or directory" in caplog.text


# --- the heart --------------------------------------------------------------------


async def test_beats_with_the_watchdog(
    manager: Manager, autojump_clock: trio.abc.Clock
) -> None:
    async def line() -> str:
        return "fine"

    # No longer than the queue of a datagram socket: net.unix.max_dgram_qlen is 10.
    with trio.move_on_after(2):
        await beat(manager.notifier, line, watchdog=0.9)
    got = manager.received()
    assert got[:2] == ["STATUS=fine", "WATCHDOG=1"]
    assert got.count("STATUS=fine") == 1
    assert got.count("WATCHDOG=1") == 7


async def test_stops_beating_when_the_answer_hangs(
    manager: Manager, autojump_clock: trio.abc.Clock
) -> None:
    lines = iter(["one", "two"])

    async def line() -> str:
        for text in lines:
            return text
        await trio.sleep_forever()
        raise AssertionError

    with trio.move_on_after(100):
        await beat(manager.notifier, line, watchdog=3)
    assert manager.received().count("WATCHDOG=1") == 2


async def test_no_watchdog_no_beats(
    manager: Manager, autojump_clock: trio.abc.Clock
) -> None:
    async def line() -> str:
        return "fine"

    with trio.move_on_after(10):
        await beat(manager.notifier, line)
    assert manager.received() == ["STATUS=fine"]


async def test_nobody_listens_to_the_heart() -> None:
    async def line() -> str:
        raise AssertionError

    await beat(Notifier({}), line)


# --- what comes in ------------------------------------------------------------------


def environment(**changed: str) -> dict[str, str]:
    given = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "control:ram",
    }
    return given | changed


def test_passed_go_by_name() -> None:
    assert systemd.passed(environment()) == (Passed("control", 3), Passed("ram", 4))
    assert systemd.sockets("ram", environment()) == (4,)
    assert systemd.sockets("other", environment()) == ()


def test_unnamed() -> None:
    given = environment()
    del given["LISTEN_FDNAMES"]
    assert systemd.passed(given) == (Passed("unknown", 3), Passed("unknown", 4))


@pytest.mark.parametrize(
    "given",
    [
        {},
        environment(LISTEN_PID="1"),
        environment(LISTEN_PID=""),
        environment(LISTEN_FDS="0"),
        environment(LISTEN_FDS="-1"),
        environment(LISTEN_FDS="many"),
    ],
)
def test_not_for_us(given: dict[str, str]) -> None:
    assert systemd.passed(given) == ()


def test_children_get_none() -> None:
    given = environment(LISTEN_FDS="0", LISTEN_FDNAMES="", OTHER="stays")
    systemd.own_descriptors(given)
    assert given == {"OTHER": "stays"}


def test_listening_socket(private_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{private_dir}/s")
        with pytest.raises(OSError, match="no listening unix socket"):
            systemd.listening_socket(sock.fileno())
        sock.listen()
        assert systemd.path_of(sock.fileno()) == f"{private_dir}/s"
        with systemd.listening_socket(os.dup(sock.fileno())) as found:
            assert found.getsockname() == f"{private_dir}/s"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        pytest.raises(OSError, match="no listening unix socket"),
    ):
        systemd.listening_socket(tcp.fileno())


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, 1.0),
    ],
)
def test_watchdog(given: dict[str, str], seconds: float | None) -> None:
    assert systemd.watchdog_seconds(given) == seconds
