"""What `srcd inspect` and `srcd verify` say."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import trio
from support import stored

import srcd.cli
from common.store import inspecting
from common.store.directory import Parked
from common.store.manifest import Block
from srcd.errand import Errand
from srcd.library import run_errand

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: str | Path) -> int:
    asked = srcd.cli.parse([str(word) for word in words])
    assert isinstance(asked, Errand)
    return run_errand(asked)


@pytest.fixture
def parked(tmp_path: Path) -> Path:
    return trio.run(stored.park, tmp_path / "vm")


def test_inspect(parked: Path, capsys: pytest.CaptureFixture[str]):
    assert run("inspect", parked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "machine      pc-i440fx-10.0"
    assert lines[1] == "VM           was running, and will be"
    assert lines[2].startswith("origin       a test, 20")
    assert lines[3] == "RAM          1.0 MiB, of which 356 KiB data"
    assert lines[4] == "  pc.ram     1.0 MiB, 348 KiB data"
    assert lines[7].startswith("devices      ")
    assert lines[7].endswith("bytes of state of 1:")
    assert lines[8].strip() == "thing"
    assert lines[9].startswith("checksums    of 19 regions")
    assert lines[10] == "working set  none yet"
    assert lines[11].startswith("destination  start it like this")


def test_inspect_for_programs(parked: Path, capsys: pytest.CaptureFixture[str]):
    with Parked.open(parked) as found:
        found.mark_running("tcp:10.0.0.2:4444")
        found.save_working_set([1, 2, 3])
    assert run("inspect", "--json", parked) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["machine"] == "pc-i440fx-10.0"
    assert known["size"] == sum(length for _, length in stored.BLOCKS)
    assert known["running"].endswith("at tcp:10.0.0.2:4444")
    assert known["working-set"] == 3
    assert known["blocks"][2] == {
        "name": "empty",
        "size": 4096,
        "data": 0,
        "page-size": 4096,
        "file": "ram-0002",
        "offset": 0,
    }
    assert run("inspect", parked) == 0
    said = capsys.readouterr().out
    assert "RUNS ELSEWHERE since" in said
    assert "3 pages, sent first" in said


def test_what_is_not_known(tmp_path: Path):
    with stored.begin(tmp_path / "vm") as parking:
        parking.set_description({"xml": "<a>\n</a>\n", "arguments": ["-M", "pc"]})
        trio.run(parking.commit, b"state", None, "paused", "")
    with Parked.open(tmp_path / "vm") as parked:
        lines = list(inspecting.describe(inspecting.facts(parked)))
    assert "VM           was paused: start QEMU with -S to keep it so" in lines
    assert any("which they are is not known" in line for line in lines)
    assert "xml: 2 lines, see --json" in lines
    assert "arguments: -M pc" in lines
    assert lines[2].startswith("origin       not known, ")


def test_many_devices_take_several_lines():
    names = ["cpu", "cpu", *(f"0000:00:{slot:02x}.0/virtio-blk" for slot in range(20))]
    lines = list(inspecting._devices({"device-state": 5 << 20, "devices": names}))
    assert lines[0] == "devices      5 MiB of state of 22:"
    assert lines[1].startswith("             cpu x2, 0000:00:00.0/virtio-blk, ")
    assert max(map(len, lines)) <= 80
    assert ", ".join(map(str.strip, lines[1:])).count("virtio-blk") == 20


def test_data_is_counted_within_the_block(tmp_path: Path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 40 * 4096)
    for page in (0, 9, 10, 20, 39):
        os.pwrite(fd, b"x", page * 4096)

    def data(first: int, pages: int) -> int:
        block = Block(
            name="a",
            length=pages * 4096,
            page_size=4096,
            file="image",
            offset=first * 4096,
        )
        return inspecting.data_bytes(fd, block) // 4096

    assert data(0, 40) == 5
    assert data(10, 10) == 1
    assert data(10, 11) == 2
    assert data(21, 10) == 0
    assert data(21, 18) == 0
    os.close(fd)


def test_verify(parked: Path, capsys: pytest.CaptureFixture[str]):
    assert run("verify", parked) == 0
    assert "OK, 1 MiB of RAM" in capsys.readouterr().out
    with (parked / "ram-0000").open("r+b") as file:
        file.seek(70000)
        file.write(b"?")
    assert run("verify", parked) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "ram-0000: RAM block pc.ram is not what it was" in said.err
    assert "offset 0x10000" in said.err


def test_what_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stored.begin(tmp_path / "vm").close()
    for verb in ("inspect", "verify"):
        assert run(verb, tmp_path / "vm") == 1
        assert "is incomplete: only a part" in capsys.readouterr().err
        assert run(verb, tmp_path / "none") == 1
        assert "No such file" in capsys.readouterr().err
    assert run("import", tmp_path / "none", tmp_path / "vm2") == 1
    assert "none: No such file" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]):
    for words in (["inspect"], ["verify"], ["import", "a"], ["import", "a", "b", "c"]):
        with pytest.raises(SystemExit) as raised:
            srcd.cli.parse(words)
        assert raised.value.code == 2
    assert "see srcd" in capsys.readouterr().err
    asked = srcd.cli.parse(["import", "--copy", "a", "b"])
    assert isinstance(asked, Errand)
    assert (str(asked.file), str(asked.directory), asked.copy) == ("a", "b", True)
