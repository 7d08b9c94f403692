"""The two example VMMs of docs/examples, with each other as the other end."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.fake_daemon import Attached, FakeDaemon, MissingPages, RequestFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
SIZE = 64 * PAGE
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
LANGUAGES = ("c", "py")
PAIRS = tuple(itertools.product(LANGUAGES, repeat=2))

pytestmark = pytest.mark.userfaultfd


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
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


class Bench:
    def __init__(self, path: Path, commands: dict[str, list[str]]) -> None:
        self.commands = commands
        self.daemon = FakeDaemon(path)
        self.attached: list[Attached] = []
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, language: str, state: str
    ) -> tuple[subprocess.Popen[str], Attached]:
        words = [str(self.daemon.path), str(SIZE), state]
        process = subprocess.Popen(
            [*self.commands[language], *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process, self.accept()

    def accept(self) -> Attached:
        vmm = self.daemon.accept()
        self.attached.append(vmm)
        return vmm

    def leave(self, vmm: Attached) -> None:
        self.attached.remove(vmm)
        vmm.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        for vmm in self.attached:
            vmm.close()
        self.daemon.close()


@pytest.fixture
def bench(private_dir: Path, commands: dict[str, list[str]]) -> Iterator[Bench]:
    bench = Bench(private_dir / "guest", commands)
    yield bench
    bench.close()


def registers(vmm: Attached) -> tuple[int, int]:
    """Counter and wrong pages, as the guest shows them in its page 0."""
    page = vmm.ram[:16]
    return int.from_bytes(page[:8], "little"), int.from_bytes(page[8:], "little")


def until(condition: Callable[[], bool]) -> None:
    """The guest is counting; the test's own time limit ends this."""
    while not condition():
        os.sched_yield()


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_guest_moves_between_examples(bench: Bench, old: str, new: str) -> None:
    process, source = bench.start(old, "running")
    until(lambda: registers(source)[0] > 2 * SIZE // PAGE)
    source.request("stop")
    source.request("stop")
    state = source.save()
    counter, _ = registers(source)
    new_process, destination = bench.start(new, "incoming")
    assert destination.message["device"] == source.message["device"]
    destination.ram[:] = source.ram[:]
    source.request("quit")
    assert process.communicate()[0] == f"counter {counter} wrong 0\n"
    destination.load(state)
    destination.request("cont")
    until(lambda: registers(destination)[0] > counter + 2 * SIZE // PAGE)
    destination.request("quit")
    output, _ = new_process.communicate()
    assert re.fullmatch(r"counter \d+ wrong 0\n", output)


@pytest.mark.parametrize("language", LANGUAGES)
def test_example_is_stopped_while_it_waits_for_a_page(
    bench: Bench, language: str
) -> None:
    _, source = bench.start("c", "running")
    until(lambda: registers(source)[0] > 2 * SIZE // PAGE)
    source.request("stop")
    process, destination = bench.start(language, "incoming")
    pages = MissingPages(destination)
    destination.load(source.save())
    destination.request("cont")
    missing = set(range(0, SIZE, PAGE))
    while missing:
        offset = pages.next_fault()
        destination.request("stop")
        destination.save()
        destination.request("cont")
        pages.place(offset, source.ram[offset : offset + PAGE])
        missing.discard(offset)
    counter, _ = registers(destination)
    until(lambda: registers(destination)[0] > counter + SIZE // PAGE)
    destination.request("quit")
    assert " wrong 0\n" in process.communicate()[0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_example_attaches_again(bench: Bench, language: str) -> None:
    _, vmm = bench.start(language, "running")
    for name in ("a", "b", "b"):
        fd = os.memfd_create(name)
        vmm.request("keep", {"kept": fd}, name=name)
        os.close(fd)
    vmm.request("forget", name="a")
    bench.leave(vmm)
    again = bench.accept()
    assert again.message["state"] == "running"
    kept = [name for name in again.descriptors if name.startswith("keep:")]
    assert kept == ["keep:b"]
    counter, _ = registers(again)
    until(lambda: registers(again)[0] > counter)


@pytest.mark.parametrize("language", LANGUAGES)
def test_example_refuses(bench: Bench, language: str) -> None:
    _, vmm = bench.start(language, "running")
    with pytest.raises(RequestFailed):
        vmm.save()
    with pytest.raises(RequestFailed):
        vmm.request("dance")
    _, incoming = bench.start(language, "incoming")
    with pytest.raises(RequestFailed):
        incoming.request("cont")
    with pytest.raises(RequestFailed, match="no device state of 'example'"):
        incoming.load(bytes(16), name="other")
