"""VMMs that attach to the daemons: bad ones, dying ones, the two examples."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import misbehaving_vmm as misbehaviour
from support.daemons import POSTCOPY, Destination, Source, move_postcopy, move_precopy
from support.misbehaving_vmm import MisbehavingVmm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
PATIENCE = 60.0
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"

pytestmark = pytest.mark.userfaultfd


@contextmanager
def starting(daemon: Source | Destination) -> Iterator[Callable[[], Any]]:
    """A daemon that waits for its guest; call what this gives once it has one."""
    with ThreadPoolExecutor(1) as pool:
        entered = pool.submit(daemon.__enter__)

        def started() -> Any:
            return entered.result(PATIENCE)

        try:
            yield started
        except BaseException:
            daemon.process.kill()
            if entered.exception() is None:
                daemon.__exit__()
            raise
        started()
    daemon.__exit__()


def source(directory: Path) -> Source:
    return Source(directory, "--guest", str(directory / "source"))


def destination(directory: Path) -> Destination:
    return Destination(directory, "--guest", str(directory / "destination"))


# --- refused at the door ----------------------------------------------------------


@pytest.fixture
def odd_files(private_dir: Path) -> Iterator[dict[str, int]]:
    """Descriptors that are no RAM."""
    short = os.memfd_create("short")
    os.ftruncate(short, 4096)
    reader, writer = os.pipe()
    whole = os.memfd_create("whole")
    os.ftruncate(whole, 4 * MIB)
    fds = {
        "short": short,
        "pipe": reader,
        "writer": writer,
        "whole": whole,
        "directory": os.open(private_dir, os.O_RDONLY),
        "read-only": os.open(f"/proc/self/fd/{whole}", os.O_RDONLY),
    }
    yield fds
    for fd in fds.values():
        os.close(fd)


BAD_PACKETS = {
    "not JSON": (b"{", "not JSON"),
    "empty array": (b"[]", "the message must be an object"),
    "binary": (bytes(range(256)), "not JSON"),
    "oversize": (b" " * 65537, "a message of more than 65536 bytes"),
    "event": (b'{"event": "shutdown"}', "the first message must be attach"),
    "return": (b'{"return": {}, "id": 0}', "the first message must be attach"),
    "request": (b'{"request": "stop", "id": 1}', "no attach, return, error or event"),
}
BAD_HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "protocol version 2 is not supported, version 1 is"),
    "types": ({"machine": 5}, "machine must be a string"),
    "blocks": ({"blocks": []}, "at least one RAM block"),
    "too few named": ({"descriptors": ["block:ram"]}, "1 descriptors are named, 3"),
    "too many named": ({"descriptors": ["x"] * 9}, "9 descriptors are named, 3 came"),
    "names": ({"descriptors": ["a", "b", "c"]}, "'block:ram' is missing"),
    "state": ({"state": "incoming"}, "this guest waits for an incoming migration"),
}
BAD_FILES = {
    "pipe": ("block:ram", "pipe", "block 'ram' is not a file"),
    "directory": ("block:ram", "directory", "block 'ram' is not a file"),
    "short": ("block:ram", "short", "the file of block 'ram' has 4096 bytes"),
    "read-only": ("block:ram", "read-only", "block 'ram' cannot be written to"),
    "userfaultfd": ("userfaultfd", "pipe", "its userfaultfd cannot be used"),
    "note": ("keep:abilities", "pipe", "its userfaultfd cannot be used"),
}


def test_refused_at_the_door(private_dir: Path, odd_files: dict[str, int]) -> None:
    """One daemon hears everything that is wrong, and then takes a good guest."""
    with (
        starting(source(private_dir)) as started,
        MisbehavingVmm(private_dir / "source") as vmm,
    ):
        for packet, reason in BAD_PACKETS.values():
            vmm.connect()
            vmm.say_bytes(packet)
            assert reason in vmm.hear_refusal()
        for changes, reason in BAD_HELLOS.values():
            vmm.connect()
            vmm.say_hello(**changes)
            assert reason in vmm.hear_refusal()
        for name, file, reason in BAD_FILES.values():
            vmm.connect()
            vmm.say_hello({name: odd_files[file]})
            assert reason in vmm.hear_refusal()
        vmm.connect()
        vmm.say_bytes(b"{}", [odd_files["pipe"]] * 130)
        assert "128 descriptors" in vmm.hear_refusal()
        vmm.attach()
        vmm.serve()
        src = started()
        assert src.execute("query-status") == {"status": "running", "running": True}
        assert open_descriptors(src) < 40
        assert "Traceback" not in src.said


def open_descriptors(daemon: Source | Destination) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def test_running_guest_refused_by_destination(private_dir: Path) -> None:
    path = private_dir / "destination"
    with (
        starting(destination(private_dir)) as started,
        MisbehavingVmm(path, state="incoming") as vmm,
    ):
        vmm.connect()
        vmm.say_hello(state="running")
        assert "this guest runs already" in vmm.hear_refusal()
        vmm.attach()
        vmm.serve()
        assert started().execute("query-status")["status"] == "inmigrate"


def test_vanishes_at_the_door(private_dir: Path) -> None:
    with (
        starting(source(private_dir)) as started,
        MisbehavingVmm(private_dir / "source") as vmm,
    ):
        for _ in range(3):
            vmm.connect()
            vmm.hang_up()
        vmm.connect()
        vmm.say_bytes(b'{"attach"')
        vmm.hang_up()
        vmm.attach()
        vmm.serve()
        assert started().execute("query-status")["status"] == "running"


def test_silent_one_delays_nobody(private_dir: Path) -> None:
    """And of two that are good the second is told that it comes too late."""
    path = private_dir / "source"
    with (
        starting(source(private_dir)) as started,
        MisbehavingVmm(path) as silent,
        MisbehavingVmm(path) as good,
    ):
        silent.connect()
        good.attach()
        good.serve()
        assert silent.hear_refusal() == "this daemon takes no guest any more"
        assert started().execute("query-status")["status"] == "running"


# --- misbehaving later ----------------------------------------------------------------


@contextmanager
def pair(
    directory: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> Iterator[tuple[Source, Destination, MisbehavingVmm, MisbehavingVmm]]:
    """Both daemons with a VMM each, which behave as told."""
    with (
        starting(source(directory)) as src,
        starting(destination(directory)) as dst,
        MisbehavingVmm(directory / "source") as one,
        MisbehavingVmm(directory / "destination", state="incoming") as other,
    ):
        one.ram[:] = bytes(range(256)) * (len(one.ram) // 256)
        one.attach()
        one.serve(ours)
        other.attach()
        other.serve(theirs)
        yield src(), dst(), one, other


def give_pipe(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
    reader, writer = os.pipe()
    vmm.give(request, reader, 100)
    os.close(reader)
    os.close(writer)


def give_too_little(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
    vmm.saved(request, b"short", 100)


def give_too_much(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
    vmm.saved(request, b"long", 1 << 40)


def give_nothing(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
    vmm.say({"return": {"length": 5}, "id": request["id"]})


GONE = ("closed its connection", "the guest's process")
AT_SOURCE = {
    "stop: error": ({"stop": "no"}, ("no",), True),
    "stop: vanish": ({"stop": misbehaviour.vanish}, GONE, False),
    "stop: nonsense": ({"stop": misbehaviour.talk_nonsense}, ("not JSON",), False),
    "stop: shutdown": ({"stop": misbehaviour.shut_down}, ("has crashed",), False),
    "stop: other": (
        {"stop": misbehaviour.answer_another},
        ("an answer that nobody asked for",),
        False,
    ),
    "save: error": ({"save": "no memory left"}, ("no memory left",), True),
    "save: vanish": ({"save": misbehaviour.vanish}, GONE, False),
    "save: pipe": ({"save": give_pipe}, ("device state cannot be read",), True),
    "save: short": ({"save": give_too_little}, ("shorter than it says",), True),
    "save: long": ({"save": give_too_much}, ("device state of length",), True),
    "save: nothing": ({"save": give_nothing}, ("lacks its descriptor",), True),
}


@pytest.mark.parametrize(
    "capabilities", [pytest.param((), id="precopy"), pytest.param(POSTCOPY, id="post")]
)
@pytest.mark.parametrize("case", AT_SOURCE)
def test_misbehaves_at_source(
    private_dir: Path, capabilities: tuple[str, ...], case: str
) -> None:
    """The migration fails on both sides; a guest that still answers goes on."""
    behaviours, texts, lives = AT_SOURCE[case]
    with pair(private_dir, behaviours, {}) as (src, dst, one, other):
        src.set_capabilities(*capabilities)
        dst.set_capabilities(*capabilities)
        src.migrate(dst.listen())
        if capabilities:
            src.execute("migrate-start-postcopy")
        assert src.wait_status("failed", "completed") == "failed"
        assert dst.wait_status("failed", "completed") == "failed"
        for text in texts:
            assert text in src.query()["error-desc"]
        assert ("cont" in one.requests) == lives
        assert "cont" not in other.requests
        status = src.execute("query-status")["status"]
        if lives:
            assert status == "running"
        else:
            if case != "stop: shutdown":  # its RAM can still be looked at
                one.wait_hung_up()
            assert status in ("shutdown", "internal-error")
        assert "Traceback" not in src.said + dst.said


AT_DESTINATION = {
    "load: error": ({"load": "no such device"}, ("no such device",)),
    "load: vanish": ({"load": misbehaviour.vanish}, ("closed its connection",)),
    "load: nonsense": ({"load": misbehaviour.talk_nonsense}, ("not JSON",)),
    "load: shutdown": ({"load": misbehaviour.shut_down}, ("has crashed",)),
    "load: other": (
        {"load": misbehaviour.answer_another},
        ("an answer that nobody asked for",),
    ),
    "load: long text": ({"load": "é" * 2000}, ("é" * 100,)),
}


@pytest.mark.parametrize(
    "capabilities", [pytest.param((), id="precopy"), pytest.param(POSTCOPY, id="post")]
)
@pytest.mark.parametrize("case", AT_DESTINATION)
def test_misbehaves_at_destination(
    private_dir: Path, capabilities: tuple[str, ...], case: str
) -> None:
    """Both sides say what the destination's VMM said; the source's goes on."""
    behaviours, texts = AT_DESTINATION[case]
    with pair(private_dir, {}, behaviours) as (src, dst, one, other):
        src.set_capabilities(*capabilities)
        dst.set_capabilities(*capabilities)
        src.migrate(dst.listen())
        if capabilities:
            src.execute("migrate-start-postcopy")
        assert src.wait_status("failed", "completed") == "failed"
        assert dst.wait_status("failed", "completed") == "failed"
        for side in (src, dst):
            for text in texts:
                assert text in side.query()["error-desc"]
        assert [r for r in one.requests if r != "forget"][-1] == "cont"
        assert "cont" not in other.requests
        assert src.execute("query-status")["status"] == "running"
        assert "Traceback" not in src.said + dst.said


def test_destination_killed_while_it_loads(private_dir: Path) -> None:
    """The last moment before it could have run the guest."""
    silence = {"load": misbehaviour.keep_silent}
    for capabilities in ((), POSTCOPY):
        with pair(private_dir, {}, silence) as (src, dst, one, other):
            src.set_capabilities(*capabilities)
            dst.set_capabilities(*capabilities)
            src.migrate(dst.listen())
            if capabilities:
                src.execute("migrate-start-postcopy")
            src.wait_status("device")
            wait_request(other, "load")
            dst.process.kill()
            assert src.wait_status("failed", "completed") == "failed"
            assert [r for r in one.requests if r != "forget"][-1] == "cont"
            assert src.execute("query-status")["running"]


@pytest.mark.parametrize(
    "capabilities", [pytest.param((), id="precopy"), pytest.param(POSTCOPY, id="post")]
)
def test_source_killed_while_destination_loads(
    private_dir: Path, capabilities: tuple[str, ...]
) -> None:
    """There was no COMMIT: the destination runs nothing."""
    killed = threading.Event()

    def load_later(vmm: MisbehavingVmm, request: dict[str, Any]) -> None:
        assert killed.wait(PATIENCE)
        vmm.say({"return": {}, "id": request["id"]})

    with pair(private_dir, {}, {"load": load_later}) as (src, dst, one, other):
        src.set_capabilities(*capabilities)
        dst.set_capabilities(*capabilities)
        src.migrate(dst.listen())
        if capabilities:
            src.execute("migrate-start-postcopy")
        wait_request(other, "load")
        src.process.kill()
        one.wait_hung_up()
        killed.set()
        # If its PONG 3 was on the way, the destination cannot know whether it
        # arrived, and keeps what it has.
        ends = ("failed", "postcopy-paused", "completed")
        assert dst.wait_status(*ends) in ends[: 2 if capabilities else 1]
        assert "cont" not in other.requests


def wait_request(vmm: MisbehavingVmm, name: str) -> None:
    while name not in vmm.requests:
        os.sched_yield()


def test_answer_twice_is_refused(private_dir: Path) -> None:
    behaviours = {"stop": misbehaviour.answer_twice}
    with pair(private_dir, behaviours, {}) as (src, _dst, one, _other):
        src.execute("stop")
        one.wait_hung_up()
        assert one.told_off == "an answer that nobody asked for"
        src.qmp.execute("query-name")


# --- the examples, and guests that die or outlive their daemon ---------------------

SIZE = 256 * 4096


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """How to start each example; the one in C is built as it says itself."""
    source = EXAMPLES / "attach_vmm.c"
    line = re.search(r"cc -o attach_vmm attach_vmm.c .*", source.read_text())
    assert line is not None
    folder = tmp_path_factory.mktemp("example")
    (folder / "attach_vmm.c").symlink_to(source)
    subprocess.run(shlex.split(line[0]), cwd=folder, check=True)
    return {
        "c": [str(folder / "attach_vmm")],
        "py": [sys.executable, str(EXAMPLES / "attach_vmm.py")],
    }


@contextmanager
def example(
    words: list[str], path: Path, state: str
) -> Iterator[subprocess.Popen[str]]:
    """A running example; it is killed in the end if it still runs."""
    process = subprocess.Popen(
        [*words, str(path), str(SIZE), state], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def example_pair(
    directory: Path, old: list[str], new: list[str]
) -> Iterator[tuple[Source, Destination, Any, Any]]:
    with (
        starting(source(directory)) as src,
        starting(destination(directory)) as dst,
        example(old, directory / "source", "running") as one,
        example(new, directory / "destination", "incoming") as other,
    ):
        yield src(), dst(), one, other


def registers(daemon: Source | Destination) -> tuple[int, int]:
    """Counter and wrong pages, as the guest shows them in its page 0."""
    path = daemon.directory / "registers"
    daemon.execute("pmemsave", val=0, size=16, filename=str(path))
    page = path.read_bytes()
    return int.from_bytes(page[:8], "little"), int.from_bytes(page[8:], "little")


def wait_counter(daemon: Source | Destination, more_than: int) -> int:
    """Until the guest has come so far; without a wrong page."""
    counter, wrong = registers(daemon)
    while counter <= more_than and wrong == 0:
        counter, wrong = registers(daemon)
    assert wrong == 0
    return counter


@pytest.mark.parametrize(
    "capabilities", [pytest.param((), id="precopy"), pytest.param(POSTCOPY, id="post")]
)
@pytest.mark.parametrize(("old", "new"), [("c", "c"), ("c", "py"), ("py", "c")])
def test_examples_move(
    private_dir: Path,
    examples: dict[str, list[str]],
    capabilities: tuple[str, ...],
    old: str,
    new: str,
) -> None:
    with example_pair(private_dir, examples[old], examples[new]) as sides:
        src, dst, one, other = sides
        src.set_capabilities(*capabilities)
        dst.set_capabilities(*capabilities)
        counter = wait_counter(src, 2 * SIZE // 4096)
        if capabilities:
            src.set_parameters(max_bandwidth=4096)
            move_postcopy(src, dst)
            assert dst.ours["postcopy-pages"] > 0
        else:
            move_precopy(src, dst)
        wait_counter(dst, counter + 2 * SIZE // 4096)
        assert one.poll() is None
        assert other.poll() is None


@pytest.mark.parametrize("side", ["source", "destination"])
def test_vmm_dies_in_precopy(
    private_dir: Path, examples: dict[str, list[str]], side: str
) -> None:
    """Both sides say so at once, not when the guest is needed next."""
    with example_pair(private_dir, examples["c"], examples["c"]) as sides:
        src, dst, one, other = sides
        src.set_capabilities()
        dst.set_capabilities()
        counter = wait_counter(src, 2 * SIZE // 4096)
        src.set_parameters(max_bandwidth=4096)
        src.migrate(dst.listen())
        src.wait_status("active")
        dst.wait_status("active")
        (one if side == "source" else other).kill()
        assert src.wait_status("failed", "completed") == "failed"
        assert dst.wait_status("failed", "completed") == "failed"
        assert "guest's process" in src.query()["error-desc"]
        if side == "source":
            assert src.execute("query-status")["status"] == "shutdown"
        else:
            assert "guest's process" in dst.query()["error-desc"]
            wait_counter(src, counter + SIZE // 4096)


@pytest.mark.parametrize("language", ["c", "py"])
@pytest.mark.parametrize("during", ["rest", "precopy"])
def test_source_restarts(
    private_dir: Path, examples: dict[str, list[str]], language: str, during: str
) -> None:
    """The guest outlives srcd, attaches to the next one, and can be moved."""
    words = examples[language]
    with (
        example(words, private_dir / "source", "running") as vmm,
        starting(destination(private_dir)) as started,
        example(words, private_dir / "destination", "incoming"),
    ):
        dst = started()
        dst.set_capabilities(*POSTCOPY)
        with source(private_dir) as src:
            counter = wait_counter(src, 2 * SIZE // 4096)
            if during == "precopy":
                src.set_capabilities()
                src.set_parameters(max_bandwidth=4096)
                with MisbehavingDestination(private_dir / "nowhere") as nowhere:
                    src.migrate(f"unix:{nowhere}")
                    src.wait_status("setup")
            src.process.kill()
            src.process.wait()
        with source(private_dir) as src:
            src.set_capabilities(*POSTCOPY)
            assert src.execute("query-status")["running"]
            counter = wait_counter(src, counter + SIZE // 4096)
            move_postcopy(src, dst)
            wait_counter(dst, counter + 2 * SIZE // 4096)
            assert vmm.poll() is None


class MisbehavingDestination:
    """Takes connections and says nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.path))
        self._socket.listen()
        return self.path

    def __exit__(self, *_: object) -> None:
        self._socket.close()
