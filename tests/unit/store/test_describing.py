"""What is noted beside a parked VM, and the command line that is made of it."""

from __future__ import annotations

import io
import json
import shlex
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support import stored

import srcd.cli
from common.errors import HostError
from common.store import description, shell
from common.store.destination import destination
from common.store.directory import Parked, Parking
from srcd.errand import Errand
from srcd.library import run_errand

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = "pc-i440fx-10.0"
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def run(*words: str | Path) -> int:
    asked = srcd.cli.parse([str(word) for word in words])
    assert isinstance(asked, Errand)
    return run_errand(asked)


@pytest.fixture
def parked(tmp_path: Path) -> Path:
    return trio.run(stored.park, tmp_path / "vm")


# --- the file ------------------------------------------------------------------------


def test_it_comes_before_the_vm(tmp_path: Path):
    (tmp_path / "vm").mkdir()
    (tmp_path / "line").write_text("qemu-system-x86_64 -m 192M")
    assert run("describe", tmp_path / "vm", "--command", tmp_path / "line") == 0
    trio.run(stored.park, tmp_path / "vm")
    with Parked.open(tmp_path / "vm") as found:
        assert found.description["command-line-from"] == "the operator"


def test_a_failed_import_leaves_it(tmp_path: Path):
    (tmp_path / "vm").mkdir()
    description.update(tmp_path / "vm", {"a": "b"})
    with Parking.create(tmp_path / "vm") as parking:
        parking.add_block("pc.ram", 4096, 4096)
        parking.discard()
    assert description.load(tmp_path / "vm")["a"] == "b"
    assert [one.name for one in (tmp_path / "vm").iterdir()] == ["description.json"]


def test_what_is_noted_later_is_added(parked: Path):
    description.update(parked, {"libvirt-xml": "<a/>"})
    description.update(parked, {"command-line": ["qemu", "b"]})
    found = description.load(parked)
    assert (found["libvirt-xml"], found["command-line"]) == ("<a/>", ["qemu", "b"])


def test_damage_is_named_and_stops_nothing(
    parked: Path, capsys: pytest.CaptureFixture[str]
):
    path = parked / "description.json"
    whole = path.read_bytes()
    damaged = [whole[:at] for at in range(len(whole))]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        for at in range(len(whole))
    ]
    for content in damaged:
        path.write_bytes(content)
        with Parked.open(parked) as found:
            assert found.device_state == stored.STATE
            with pytest.raises(
                HostError, match=r"description\.json is not what it was"
            ):
                _ = found.description
    assert run("inspect", parked) == 0
    assert "described    no: " in capsys.readouterr().out
    assert run("verify", parked) == 1
    assert "describe the VM again" in capsys.readouterr().err
    description.update(parked, {"a": "b"})
    assert description.load(parked)["a"] == "b"


def test_no_description_is_none(parked: Path, capsys: pytest.CaptureFixture[str]):
    (parked / "description.json").unlink()
    assert run("verify", parked) == 0
    assert run("inspect", parked) == 0
    assert "its command line is not known" in capsys.readouterr().out


# --- words ---------------------------------------------------------------------------


@given(st.lists(WORD))
def test_words_are_quoted_and_read(words: list[str]):
    line = shlex.join(["qemu", *words])
    assert shell.words_untrusted(line.encode()) == ["qemu", *words]


@given(st.text(st.sampled_from("ab \\\"'\n\t#=,~*")))
def test_lines_are_read_as_a_shell_does(text: str):
    """shlex knows no line that goes on, and takes other white space, too."""
    text = text.replace("\n", "")
    try:
        expected = shlex.split(f"qemu {text}")
    except ValueError:
        with pytest.raises(shell.ShellError):
            shell.words_untrusted(f"qemu {text}".encode())
        return
    assert shell.words_untrusted(f"qemu {text}".encode()) == expected


@pytest.mark.parametrize("text", ["\\ ", "\\  ", "\\\t", "a \\ \n", "\\\\ "])
def test_a_space_at_the_end(text: str):
    """Behind a backslash it is a word."""
    expected = shlex.split(f"qemu {text}")
    assert shell.words_untrusted(f"qemu {text}".encode()) == expected


@pytest.mark.parametrize("word", ["ü'\n\x1b[2J\\x", "\udcff7", "a b", "", "\x01" + "7"])
def test_quoted_words_reach_a_program(word: str):
    command = f"printf %s {shell.quote(word)}"
    ran = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True)
    assert ran.stdout == word.encode(errors="surrogateescape")
    assert shell.quote(word).isprintable()


def test_several_lines_and_zero_bytes():
    assert shell.words_untrusted(b"qemu \\\n -m 1\\\n9 'a\\\nb' \"c\\\nd\" e\n") == (
        ["qemu", "-m", "19", "a\\\nb", "cd", "e"]
    )
    assert shell.words_untrusted(b"qemu\0-name\0\0a b\0") == [
        "qemu",
        "-name",
        "",
        "a b",
    ]


BAD = {
    "": "is empty",
    " \n": "is empty",
    "-m 5": "begin with the program",
    "qemu 'a": "is not closed",
    'qemu "a': "is not closed",
    "qemu a\\": "ends with a backslash",
    "qemu $HOME/a": "only a shell knows",
    'qemu "$HOME"': "only a shell knows",
    "qemu `a`": "only a shell knows",
    "qemu -S &": "only a shell knows",
    "qemu | cat": "only a shell knows",
    "qemu\nqemu": "several lines",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_command_line(
    text: str,
    parked: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run("describe", parked, "--command", "-") == 1
    said = capsys.readouterr().err
    assert said.startswith("srcd: standard input: ")
    assert BAD[text] in said


@given(st.binary(max_size=40))
def test_any_bytes(text: bytes):
    try:
        words = shell.words_untrusted(text)
    except shell.ShellError:
        return
    assert words[0]


def test_where_it_cannot_be_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "line").write_text("qemu")
    for place, words in ((tmp_path, "neither empty nor"), (tmp_path / "no", "No such")):
        assert run("describe", place, "--command", tmp_path / "line") == 1
        assert words in capsys.readouterr().err
    assert run("describe", tmp_path) == 1
    assert "give --qmp, --command or both" in capsys.readouterr().err


# --- the destination -----------------------------------------------------------------


def made(line: str, *, running: bool = True) -> Any:
    return destination(shlex.split(line), MACHINE, running=running)


def test_what_is_left_out_and_added():
    found = made(
        "qemu -daemonize --pidfile a.pid -S -loadvm x -incoming tcp:0:1 -preconfig"
        f" -M {MACHINE} -append '-S -daemonize' -device virtio-net-pci,netdev=n"
    )
    assert found.words == [
        *("qemu", "-M", MACHINE, "-append", "-S -daemonize"),
        *("-device", "virtio-net-pci,netdev=n", "-incoming", "defer"),
    ]
    assert len(found.changes) == 7
    assert any(one.startswith("left out: --pidfile a.pid (") for one in found.changes)


def test_an_argument_is_none_of_the_options():
    assert made(f"qemu -M {MACHINE} -name -S").words[3:5] == ["-name", "-S"]
    assert made(f"qemu -M {MACHINE} -nodefaults -S").words[3:4] == ["-nodefaults"]


def test_a_paused_vm_stays_so():
    found = made(f"qemu -S -M {MACHINE}", running=False)
    assert found.words == ["qemu", "-M", MACHINE, "-incoming", "defer", "-S"]
    assert not any(one.startswith("left out") for one in found.changes)


MACHINES = {
    "-M pc": f"-M {MACHINE}",
    "-machine pc,accel=tcg": f"-machine {MACHINE},accel=tcg",
    "-machine accel=pc,type=pc": f"-machine accel=pc,type={MACHINE}",
    "-machine accel=tcg": f"-machine {MACHINE} -machine accel=tcg",
    "-m 5": f"-machine {MACHINE} -m 5",
}


@pytest.mark.parametrize("line", MACHINES)
def test_the_machine_gets_its_version(line: str):
    found = made(f"qemu {line}")
    assert shlex.join(found.words) == f"qemu {MACHINES[line]} -incoming defer"
    assert any(one.startswith("changed: ") for one in found.changes)


LOOKS = {
    "disk.img": "the disk has to be",
    "-hda disk.img": "the disk has to be",
    "-drive if=none,file=a,format=raw": "the disk has to be",
    '-blockdev \'{"driver":"file","filename":"a"}\'': "the disk has to be",
    "-snapshot": "temporary files",
    "-qmp unix:/run/a,server=on": "has to be free",
    "-chardev socket,id=a,path=/run/a": "has to be free",
    "-chardev socket,id=a,fd=7": "a descriptor",
    "-serial file:/tmp/a": "is written to",
    "-vnc :1": "has to be free",
    "-netdev tap,id=a": "has to be there",
    "-nic tap": "has to be there",
    "-netdev user,id=a,hostfwd=tcp::1-:2": "has to be free",
    "-netdev tap,fds=3:4,id=a": "a descriptor",
    "-object memory-backend-file,id=a,mem-path=/a,size=1G": "lazily",
    "-cpu host": "CPU of this host",
    "-kernel a": "a file that",
}


@pytest.mark.parametrize("line", LOOKS)
def test_what_to_look_at(line: str):
    found = made(f"qemu -M {MACHINE} {line}")
    assert any(LOOKS[line] in one for one in found.look_at)
    assert shlex.split(" ".join(found.lines).replace("\\ ", "")) == found.words


def test_nothing_to_look_at():
    quiet = "-nodefaults -serial none -chardev stdio,id=a -netdev user,id=n -cpu qemu64"
    assert made(f"qemu -M {MACHINE} {quiet}").look_at == ()


def test_inspect(parked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "line").write_text("qemu-system-x86_64 -M pc -name 'my vm' -hda a.img")
    assert run("describe", parked, "--command", tmp_path / "line") == 0
    assert "a command line of 7 words, the operator" in capsys.readouterr().out
    assert run("inspect", parked) == 0
    said = capsys.readouterr().out
    assert (
        "    qemu-system-x86_64 \\\n        -M pc-i440fx-10.0 \\\n"
        "        -name 'my vm' \\\n        -hda a.img \\\n        -incoming defer\n"
    ) in said
    assert "  LOOK AT -hda a.img: the disk" in said
    assert run("inspect", "--json", parked) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["destination"]["words"][-2:] == ["-incoming", "defer"]


# --- QMP that is none ----------------------------------------------------------------


def test_no_socket(parked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("describe", parked, "--qmp", tmp_path / "none") == 1
    assert "cannot connect to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0\r\n", b"", b"{}\n[]\n", b'{"QMP": {}}\n{"return": {}, "id": 1}\n'],
)
def test_another_server(
    answer: bytes, parked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()

        def serve() -> None:
            server.accept()[0].close()  # whose process that is
            with server.accept()[0] as one:
                one.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert run("describe", parked, "--qmp", tmp_path / "s") == 1
        thread.join()
    said = capsys.readouterr().err
    assert str(tmp_path / "s") in said
    assert "QEMU" in said
