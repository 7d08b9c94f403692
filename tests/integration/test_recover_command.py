"""`srcd recover`: what it does at both ends, and each of its exit statuses."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest
from support.daemons import POSTCOPY, Destination, Source, prepare
from support.recover import SSH, recover, run
from support.recovery import GUEST, LITTLE, both_ways, in_postcopy

if TYPE_CHECKING:
    from pathlib import Path

    from support.recover import Run
    from support.recovery import Ends

pytestmark = [pytest.mark.userfaultfd]

DONE, FAILED, USAGE, PAUSED, CANCELLED = range(5)


def again(ends: Ends, *words: str) -> Run:
    return recover(ends.src.qmp_path, ends.dst.qmp_path, *words)


def cut(ends: Ends) -> None:
    for link in ends.relay.wait_links(ends.channels):
        link.reset()
    ends.assert_paused()


def cut_one_end(ends: Ends, number: int) -> None:
    """0: the source notices; 1: the destination. The other goes on waiting."""
    for link in ends.relay.wait_links(ends.channels):
        link.hang_up(number)
    (ends.src, ends.dst)[number].wait_status("postcopy-paused")


def goes_on(ends: Ends) -> None:
    for side in (ends.src, ends.dst):
        side.wait_status("postcopy-recover")
        side.wait_status("postcopy-active")
    ends.complete()


# --- 0: it goes on ------------------------------------------------------------------


@both_ways
def test_both_paused(private_dir: Path, capabilities: tuple[str, ...]) -> None:
    with in_postcopy(private_dir, capabilities) as ends:
        cut(ends)
        here = ends.dst.ours["postcopy-pages"]
        done = again(ends)
        assert done.returncode == DONE, done
        said = done.stdout.splitlines()
        assert [line.split(" (")[0] for line in said[:2]] == [
            "source: postcopy-paused",
            "destination: postcopy-paused",
        ]
        assert said[2].startswith("destination: migrate-recover tcp:127.0.0.1:")
        assert said[3].startswith("source: migrate tcp:127.0.0.1:")
        assert said[-1] == "postcopy goes on"
        assert done.stderr == ""
        goes_on(ends)
        assert ends.dst.ours["postcopy-pages"] > here


@pytest.mark.parametrize("number", [0, 1], ids=["source", "destination"])
def test_only_one_has_noticed(private_dir: Path, number: int) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut_one_end(ends, number)
        done = again(ends)
        assert done.returncode == DONE, done
        other = ("destination", "source")[number]
        assert f"{other}: migrate-pause" in done.stdout.splitlines()
        (ends.dst, ends.src)[number].wait_status("postcopy-paused")
        goes_on(ends)


def test_at_another_address(private_dir: Path) -> None:
    path = private_dir / "again"
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut(ends)
        done = again(ends, "--uri", f"unix:{path}")
        assert done.returncode == DONE, done
        assert f"source: migrate unix:{path} resume" in done.stdout.splitlines()
        goes_on(ends)


def test_all_addresses_are_none_to_connect_to(private_dir: Path) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut(ends)
        done = again(ends, "--uri", "tcp:0.0.0.0:0")
        assert done.returncode == DONE, done
        assert "source: migrate tcp:127.0.0.1:" in done.stdout
        goes_on(ends)


def test_over_ssh(private_dir: Path) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut(ends)
        peer = f"ssh:root@127.0.0.1:{ends.dst.qmp_path}"
        done = recover(ends.src.qmp_path, peer, POSTCOPYD_SSH=SSH)
        assert done.returncode == DONE, done
        assert done.stderr == "to root@127.0.0.1\n"
        goes_on(ends)


def test_over_ssh_the_socket_is_called_alike(private_dir: Path) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut(ends)
        done = recover(ends.src.qmp_path, "ssh:127.0.0.1", POSTCOPYD_SSH=SSH)
        assert done.returncode == DONE, done
        goes_on(ends)


def test_as_often_as_wanted(private_dir: Path) -> None:
    """While it is active, when it is paused, and when it is over."""
    with in_postcopy(private_dir, POSTCOPY) as ends:
        done = again(ends)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (
            DONE,
            "postcopy goes on",
        )
        assert "migrate" not in done.stdout.replace("migrated", "")
        cut(ends)
        assert again(ends).returncode == again(ends).returncode == DONE
        goes_on(ends)
        done = again(ends)
        assert (done.returncode, done.stdout) == (DONE, "the migration is completed\n")
        assert ends.src.statuses.count("postcopy-paused") == 1


# --- 3: paused, and it can be tried again -------------------------------------------


def test_nobody_is_reached(private_dir: Path) -> None:
    """The destination listens, but not where the source looks for it."""
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut(ends)
        peer = f"ssh:nowhere.invalid:{ends.dst.qmp_path}"
        uri = ("--uri", "tcp:0.0.0.0:0")
        done = recover(ends.src.qmp_path, peer, *uri, POSTCOPYD_SSH=SSH)
        assert done.returncode == PAUSED, done
        said = done.stdout.splitlines()
        assert any(line.startswith("source: migrate tcp:nowhere.inv") for line in said)
        assert said[-1].startswith("paused again: ")
        assert "nowhere.invalid" in said[-1]
        assert again(ends, "--uri", "tcp:127.0.0.1:0").returncode == DONE
        ends.src.statuses.clear()
        ends.dst.statuses.clear()
        ends.complete()


def test_it_cannot_listen_there(private_dir: Path) -> None:
    with (
        in_postcopy(private_dir, POSTCOPY) as ends,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        cut(ends)
        done = again(ends, "--uri", f"tcp:127.0.0.1:{taken.getsockname()[1]}")
        assert done.returncode == PAUSED, done
        assert "Address already in use" in done.stdout
        assert again(ends).returncode == DONE
        goes_on(ends)


def test_the_peer_is_not_reached(private_dir: Path) -> None:
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut(ends)
        for peer, why in (
            (f"{private_dir}/nowhere", "No such file or directory"),
            ("ssh:127.0.0.1:/nowhere", "the server has closed the connection"),
        ):
            done = recover(ends.src.qmp_path, peer, POSTCOPYD_SSH=SSH)
            assert done.returncode == PAUSED, done
            last = done.stdout.splitlines()[-1]
            assert why in last
            assert last.endswith("the source is postcopy-paused")
        assert again(ends).returncode == DONE
        goes_on(ends)


def test_not_in_time(private_dir: Path) -> None:
    """The destination has not noticed, and there is no time to be sure of that."""
    with in_postcopy(private_dir, POSTCOPY) as ends:
        cut_one_end(ends, 0)
        done = again(ends, "--timeout", "0.1")
        assert done.returncode == PAUSED, done
        assert "not within 0.1 s" in done.stdout
        assert again(ends).returncode == DONE
        ends.dst.wait_status("postcopy-paused")
        goes_on(ends)


# --- 1 and 4: nothing to recover ----------------------------------------------------


def test_nothing_to_recover(private_dir: Path) -> None:
    """Never begun; in precopy; cancelled; failed."""
    with (
        Source(private_dir, *GUEST) as src,
        Destination(private_dir, *LITTLE) as dst,
    ):
        src.wait_filled()
        prepare(src, dst, *POSTCOPY)
        src.set_parameters(max_bandwidth=1 << 20)

        def recovered() -> Run:
            return recover(src.qmp_path, dst.qmp_path)

        done = recovered()
        assert done.returncode == FAILED
        assert "no migration was begun here" in done.stdout
        src.migrate(dst.listen())
        src.wait_status("active")
        done = recovered()
        assert done.returncode == FAILED
        assert "this is no postcopy yet" in done.stdout
        src.execute("migrate_cancel")
        src.wait_status("cancelled")
        done = recovered()
        assert done.returncode == CANCELLED
        assert "the guest is here" in done.stdout
        src.migrate(f"unix:{private_dir}/nowhere")
        src.wait_status("failed")
        done = recovered()
        assert done.returncode == FAILED
        assert "No such file or directory" in done.stdout


def test_a_destination_that_knows_nothing(private_dir: Path) -> None:
    """Its daemon and its guest were started anew."""
    with (
        in_postcopy(private_dir, POSTCOPY) as ends,
        Destination(private_dir, *LITTLE, name="other") as other,
    ):
        cut(ends)
        done = recover(ends.src.qmp_path, other.qmp_path)
        assert done.returncode == FAILED, done
        assert "knows nothing of this migration" in done.stdout
        assert again(ends).returncode == DONE
        goes_on(ends)


def test_no_source(private_dir: Path) -> None:
    done = recover(private_dir / "nowhere", private_dir / "nowhere")
    assert done.returncode == FAILED
    assert "cannot talk to" in done.stdout


# --- 2: usage -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "the following arguments are required: --qmp, --peer"),
        (("--qmp", "q"), "required: --peer"),
        (("--qmp", "q", "--peer", "ssh:-oProxyCommand=x:/q"), "names no host"),
        (("--qmp", "q", "--peer", "ssh:there"), "say where the control socket is"),
        (("--qmp", "q", "--peer", "p", "--uri", "x"), "unknown migration protocol"),
        (("--qmp", "q", "--peer", "p", "--uri", "exec:x"), "nobody can connect"),
        (("--qmp", "q", "--peer", "p", "--timeout", "0"), "more than 0"),
    ],
)
def test_usage(words: tuple[str, ...], why: str) -> None:
    done = run("srcd", "recover", *words)
    assert done.returncode == USAGE
    assert why in done.stderr
    assert done.stderr.startswith("srcd recover: ")


# --- the proxy ----------------------------------------------------------------------


@pytest.mark.parametrize("program", ["srcd", "dstd"])
def test_a_proxy_answers_to_the_last_line(private_dir: Path, program: str) -> None:
    lines = '{"execute": "qmp_capabilities"}\n{"execute": "query-status"}\n'
    with Source(private_dir, *LITTLE) as src:
        proxy = f"{program} proxy --qmp {src.qmp_path}"
        done = run("sh", "-c", f"printf '%s' '{lines}' | {proxy}")
    assert done.returncode == 0
    greeting, *replies = map(json.loads, done.stdout.splitlines())
    assert "QMP" in greeting
    assert replies == [
        {"return": {}},
        {"return": {"status": "running", "running": True}},
    ]


def test_a_proxy_that_leads_nowhere(private_dir: Path) -> None:
    for program in ("srcd", "dstd"):
        done = run(program, "proxy", "--qmp", f"{private_dir}/nowhere")
        assert done.returncode == 1
        assert done.stderr == (
            f"cannot connect to {private_dir}/nowhere: No such file or directory\n"
        )
