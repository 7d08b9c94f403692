"""A test that leaves a process behind is found out."""

from __future__ import annotations

import subprocess

from support import processes


def test_a_process_that_stays() -> None:
    with subprocess.Popen(["sleep", "1000"]) as stays:
        assert stays.pid in processes.children()
        assert not processes.wait_end(stays.pid, 0)
        processes.end(stays.pid)
        assert stays.pid not in processes.children()


def test_a_process_that_ends_a_moment_later() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as ends:
        assert not processes.wait_end(ends.pid, 0)
        assert ends.stdin
        ends.stdin.close()
        assert processes.wait_end(ends.pid, 60)
        assert ends.pid not in processes.children()
        assert ends.wait() == 0, "its exit status was not taken from its test"


def test_what_an_ended_child_has_started_is_found() -> None:
    """A daemon's guest outlives it."""
    script = "sleep 1000 >/dev/null & echo $!"
    pid = int(subprocess.check_output(["sh", "-c", script]))
    assert pid in processes.children()
    processes.end(pid)
    assert pid not in processes.children()
