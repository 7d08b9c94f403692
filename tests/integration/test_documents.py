"""What the documents say is so: commands, links, tables, messages, sessions.

The sessions of the README are played line by line, with paths, ports and sizes
replaced. Terminals are processes; socat is played by a socket of the test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import qemu

from common import status
from common.guest import attach
from dstd.cli import parse as parse_dstd
from srcd.cli import parse as parse_srcd

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
ATTACH_PROTOCOL = ROOT / "docs" / "attach-protocol.md"
DOCUMENTS = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
PATIENCE = 60.0  # seconds


# --- reading Markdown ----------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block and the heading that it stands under."""

    heading: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Without the line breaks that a backslash hides."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line]


def blocks(document: Path) -> Iterator[Block]:
    heading = ""
    pattern = r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$"
    for found in re.finditer(pattern, document.read_text(), re.M | re.S):
        if found[1]:
            heading = found[1]
        else:
            yield Block(heading, found[2], found[3])


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def code_spans(document: Path) -> list[str]:
    """What stands between backticks; a line break in it is a space."""
    return [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))
    ]


def command_lines(document: Path) -> list[str]:
    shown = [line for b in blocks(document) if b.language == "sh" for line in b.lines]
    return [*shown, *code_spans(document)]


# --- command lines ------------------------------------------------------------


def words_of(program: str, document: Path = README) -> list[list[str]]:
    lines = [shlex.split(line) for line in command_lines(document) if "'" not in line]
    return [words[1:] for words in lines if words[:1] == [program] and words[1:]]


def test_daemons_take_their_command_lines() -> None:
    source, destination = words_of("srcd"), words_of("dstd")
    assert len(source) >= 3
    assert len(destination) >= 3
    for words in source:
        assert parse_srcd(words).qmp
    for words in destination:
        assert parse_dstd(words).incoming


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_are_there(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    lines = [line.split() for line in command_lines(document)]
    named = {words[1] for words in lines if words[:1] == ["make"] and words[1:]}
    assert named <= targets
    if document == README:
        assert {"demo", "test", "format"} <= named


# --- links --------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The names that a forge gives to headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.M)
    bare = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in bare}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(document)):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} links {target}"


def test_files_named_by_the_architecture_are_there() -> None:
    files = [s for s in code_spans(ARCHITECTURE) if re.search(r"/\w+\.(py|[ch])$", s)]
    assert len(files) > 20
    # The walks write csrc/ for what the tree has in full.
    places = (ROOT, ROOT / "common" / "native")
    for name in files:
        assert any((place / name).exists() for place in places), name


def walk_rows() -> list[tuple[str, list[str]]]:
    """Of each row in the tables of the walks: its file, and the functions."""
    rows = re.findall(
        r"^\| \d+ \| \w+ \| `([\w/.]+)` \| (.+?) \|", prose(ARCHITECTURE), re.M
    )
    return [(file, re.findall(r"`([\w.]+)`", names)) for file, names in rows]


def test_functions_named_by_the_walks_are_there() -> None:
    rows = walk_rows()
    assert len(rows) > 20
    for file, names in rows:
        path = ROOT / file
        text = (path if path.exists() else ROOT / "common/native" / file).read_text()
        for name in names:
            last = name.rpartition(".")[2]
            assert re.search(rf"\b{last}\(", text), f"{file} has no {name}"


# --- tables -------------------------------------------------------------------

TABLES = {
    "Source": status.OUTGOING,
    "Destination": status.INCOMING,
    "Incoming postcopy": status.POSTCOPY,
}


@pytest.mark.parametrize("heading", TABLES)
def test_status_tables_are_those_of_the_code(heading: str) -> None:
    found = [b for b in blocks(ARCHITECTURE) if b.heading == heading]
    (block,) = [b for b in found if b.language == "text"]
    rows = {}
    for line in block.lines:
        old, _, new = line.partition("->")
        rows[old.strip()] = set(new.split())
    assert rows == {
        str(old): {str(one) for one in new}
        for old, new in TABLES[heading].items()
        if new
    }


def test_stages_are_those_of_the_script() -> None:
    script = (ROOT / ".ci" / "stages").read_text()
    stages = set(re.findall(r"^def (\w+)\(\) -> Count:", script, re.M))
    named = re.findall(r"^\| `(\w+)` \|", prose(ROOT / "docs" / "testing.md"), re.M)
    assert set(named) == stages


# --- attach messages ----------------------------------------------------------


def test_attach_example_decodes() -> None:
    (example,) = [b.text for b in blocks(ATTACH_PROTOCOL) if b.language == "json"]
    found = attach.decode_untrusted(example.encode(), descriptors=3)
    assert isinstance(found, attach.Attach)
    assert [block.idstr for block in found.blocks] == ["ram"]


def messages() -> Iterator[dict[str, Any]]:
    """The messages within the text; N, NAME and {...} stand for any."""
    for span in code_spans(ATTACH_PROTOCOL):
        if span.startswith("{"):
            text = span.replace("{...}", "{}").replace(" N", " 1")
            yield json.loads(text.replace(" 1AME", ' "stop"'))


def test_messages_of_the_protocol_are_those_of_the_code() -> None:
    seen = set()
    for message in messages():
        (kind,) = message.keys() & {
            *("attached", "refused", "request", "return", "error", "event")
        }
        seen.add(kind)
        match kind:
            case "attached":
                assert message == json.loads(attach.attached())
            case "refused":
                assert message == json.loads(attach.refused("one sentence"))
            case "request":
                assert message == json.loads(attach.request("stop", 1, {}, ()))
            case _:
                attach.decode_untrusted(json.dumps(message).encode(), descriptors=0)
    assert len(seen) == 6


# --- sessions -----------------------------------------------------------------


class Qmp:
    """What socat is to the reader: lines in, lines out."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("r")
        self._last = ""
        assert "QMP" in json.loads(self._lines.readline())

    def send(self, line: str) -> dict[str, Any]:
        self._last = line
        self._socket.sendall(line.encode() + b"\n")
        while True:
            message: dict[str, Any] = json.loads(self._lines.readline())
            if "event" not in message:
                assert "return" in message, f"{line}: {message}"
                return message

    def again_until(self, wanted: str) -> dict[str, Any]:
        """Repeat the last line until it returns this status."""
        deadline = time.monotonic() + PATIENCE
        while True:
            reply = self.send(self._last)
            found = reply["return"]["status"]
            if found == wanted:
                return reply
            assert found != "failed", reply
            assert time.monotonic() < deadline, reply
            time.sleep(0.02)  # as a reader would press the key again

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def connected(path: str) -> Qmp:
    """A connection to a program that may still be starting."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Qmp(path)
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline, path
            time.sleep(0.02)


TERMINALS = ("srcd", "dstd", "qemu-system-x86_64", "python3")
ANSWERS = ("inspect", "verify")  # verbs of the daemons that end by themselves


class Session:
    """Plays blocks of a document in `directory`, which stands for its paths."""

    def __init__(
        self, directory: Path, *, size: str = "1G", document: Path = README
    ) -> None:
        self.directory = directory
        self._document = document
        self.size = size
        self.qmp: dict[str, Qmp] = {}
        self.client: Qmp
        self.output: dict[str, str] = {}
        self._ports: dict[str, str] = {}
        self._terminals: list[subprocess.Popen[bytes]] = []
        self._starting: list[str] = []  # control sockets that may not be there yet

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for process in self._terminals:
                stack.callback(process.wait, PATIENCE)
                stack.callback(process.terminate)
            for client in self.qmp.values():
                stack.callback(client.close)

    def play(self, heading: str) -> None:
        for block in blocks(self._document):
            if block.heading != heading:
                continue
            if block.language == "sh":
                for line in block.lines:
                    self._shell(line)
            elif block.language == "json":
                self._json(block)

    def _here(self, text: str) -> str:
        text = re.sub(r"/run/x|/srv|/tmp|/dev/shm", str(self.directory), text)
        text = re.sub(r"127\.0\.0\.1:(\d+)", self._free_port, text)
        text = re.sub(r"\b1G\b", self.size, text)
        text = text.replace("qemu-system-x86_64", str(qemu.executable()))
        return text.replace(" .venv/", f" {sys.prefix}/")

    def _free_port(self, shown: re.Match[str]) -> str:
        if shown[1] not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as server:
                self._ports[shown[1]] = str(server.getsockname()[1])
        return f"127.0.0.1:{self._ports[shown[1]]}"

    def _shell(self, line: str) -> None:
        program, first = line.split()[:2]
        here = self._here(line)
        if program in TERMINALS and first not in ANSWERS:
            self._terminals.append(self._start(f"exec {here}"))
            self._starting += re.findall(r"-qmp (?:unix:)?([^ ,]+)", here)
        elif program == "socat":
            self._connect(here.partition("UNIX-CONNECT:")[2])
        else:
            self.output[line] = self._run(here, again=program == "grep")

    def _start(self, line: str, **more: Any) -> subprocess.Popen[bytes]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path}
        return subprocess.Popen(
            ["bash", "-c", line],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            **more,
        )

    def _run(self, line: str, *, again: bool) -> str:
        """Run a command; `again` until it succeeds."""
        deadline = time.monotonic() + PATIENCE
        while True:
            process = self._start(line, stdout=subprocess.PIPE)
            output, _ = process.communicate()
            if process.returncode == 0:
                return output.decode()
            assert again, line
            assert time.monotonic() < deadline, line
            time.sleep(0.05)  # a file has no events

    def _connect(self, path: str) -> None:
        """A program that answers on its control socket is ready; wait for all."""
        for starting in self._starting:
            connected(starting).close()
        self._starting.clear()
        if path in self.qmp:
            self.qmp[path].close()
        self.client = self.qmp[path] = connected(path)

    def _json(self, block: Block) -> None:
        """Commands, one a line; or the reply to the last one, to be waited for."""
        if not block.text.startswith('{"return"'):
            for line in block.lines:
                self.client.send(self._here(line))
            return
        shown = json.loads(block.text)["return"]
        reply = self.client.again_until(shown["status"])["return"]
        assert_within(shown, reply)


def assert_within(shown: dict[str, Any], reply: dict[str, Any]) -> None:
    """Whatever the document shows is in the reply; numbers may differ."""
    for name, value in shown.items():
        if isinstance(value, dict):
            assert_within(value, reply[name])
        elif isinstance(value, int | float) and not isinstance(value, bool):
            assert isinstance(reply[name], int | float)
        else:
            assert reply[name] == value


def shape(value: Any) -> Any:
    """The names of all members, whatever their values."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    return None


@pytest.mark.userfaultfd
def test_moving_a_guest_by_hand(private_dir: Path) -> None:
    with Session(private_dir) as session:
        session.play("Moving a guest by hand")
        source, destination = (
            session.qmp[f"{private_dir}/web1-{side}.qmp"] for side in ("src", "dst")
        )
        query = '{"execute": "query-migrate"}'
        sent, got = (side.send(query)["return"] for side in (source, destination))
    (example,) = [b for b in blocks(README) if b.heading == "What query-migrate shows"]
    shown = json.loads(example.text)["return"]
    assert shape(shown) == shape(sent)
    assert sent["status"] == got["status"] == "completed"
    ours, theirs = sent["x-postcopyd"], got["x-postcopyd"]
    assert ours["urgent-pages"] > 0
    assert theirs["postcopy-pages"] == ours["urgent-pages"] + ours["background-pages"]
    named = set(code_spans(README))
    assert ours.keys() | theirs.keys() <= named
    (serial,) = [text for line, text in session.output.items() if "goes on" in line]
    assert "wrong=0" in serial


@pytest.mark.qemu
def test_ram_without_cpus_facing_qemu(private_dir: Path) -> None:
    """Both ways; what cmp says is checked as it runs."""
    with Session(private_dir, size="64M") as session:
        session.play("RAM without CPUs, facing QEMU")
    assert b"what is in guest RAM" in (private_dir / "park.ram").read_bytes()[:64]


@pytest.mark.userfaultfd
def test_attaching_another_vmm(private_dir: Path) -> None:
    with Session(private_dir) as session:
        session.play("Attaching another VMM")
        (registers,) = [out for line, out in session.output.items() if "od " in line]
    counter, wrong = map(int, registers.split())
    assert counter > 0
    assert wrong == 0
