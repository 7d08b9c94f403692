"""A parked VM as a directory: complete, or visibly not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio
from support import stored
from support.small_disk import in_small_disk, needs_mounts

from common.errors import HostError
from common.store import manifest, receiving, working_set
from common.store.directory import Parked, Parking

if TYPE_CHECKING:
    from pathlib import Path

# --- what is put in comes out --------------------------------------------------------


async def test_all_that_was_put_in(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    with Parked.open(path) as parked:
        found = parked.manifest
        assert found.machine == "pc-i440fx-10.0"
        assert [(b.name, b.length) for b in found.blocks] == list(stored.BLOCKS)
        assert (found.advised, found.run_state) == (True, "running")
        assert (found.origin, found.devices) == (stored.ORIGIN, ("thing",))
        assert parked.configuration == stored.CONFIGURATION
        assert parked.early == b"early"
        assert parked.device_state == stored.STATE
        assert parked.vmdesc == stored.TEXT
        assert parked.description == stored.DESCRIPTION
        assert parked.running is None
        assert parked.working_set == ()
        parked.verify()
        for block, fd in zip(found.blocks, parked.blocks(), strict=True):
            assert os.fstat(fd).st_size == block.length
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)


async def test_holes_stay_holes(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    with Parked.open(path) as parked:
        parked.verify()
        assert os.fstat(parked.blocks()[2]).st_blocks == 0
        assert os.fstat(parked.blocks()[0]).st_blocks * 512 < stored.LENGTH


async def test_nothing_of_receiving_is_left(tmp_path: Path):
    with stored.begin(tmp_path / "vm") as parking:
        os.close(parking.keep("migration", 100))
        await parking.commit(stored.STATE, None, "paused", "")
    assert sorted(os.listdir(tmp_path / "vm")) == [
        *("checksums", "configuration", "description.json", "device-state"),
        *("early-state", "manifest.json", "ram-0000", "ram-0001", "ram-0002"),
    ]
    with Parked.open(tmp_path / "vm") as parked:
        assert parked.vmdesc is None
        assert parked.manifest.devices == ()


async def test_names_of_blocks_do_not_reach_the_file_system(tmp_path: Path):
    with Parking.create(tmp_path / "vm") as parking:
        parking.set_configuration(stored.CONFIGURATION)
        for name in ("../../escape", "/etc/x", "manifest.json", "."):
            parking.add_block(name, 4096, 4096)
        await parking.commit(b"", None, "running", "")
    assert os.listdir(tmp_path) == ["vm"]
    with Parked.open(tmp_path / "vm") as parked:
        assert parked.manifest.blocks[0].name == "../../escape"


# --- who may be created, and opened --------------------------------------------------


async def test_create_refuses_what_is_there(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    with pytest.raises(HostError, match="holds a parked VM already"):
        Parking.create(path)
    with pytest.raises(HostError, match="holds a parked VM already"):
        Parking.reopen(path)
    with stored.begin(tmp_path / "half"):
        with pytest.raises(HostError, match="in use by another process"):
            Parking.create(tmp_path / "half")
        with pytest.raises(HostError, match="in use by another process"):
            Parking.reopen(tmp_path / "half")
    with pytest.raises(HostError, match="only a part arrived"):
        Parking.create(tmp_path / "half")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one").touch()
    with pytest.raises(HostError, match="not empty: it holds one"):
        Parking.create(tmp_path / "letters")
    with pytest.raises(HostError, match="not even a part of one"):
        Parking.reopen(tmp_path / "letters")
    with pytest.raises(HostError, match="No such file"):
        Parking.create(tmp_path / "no" / "such")
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="Not a directory"):
        Parking.create(tmp_path / "file")


async def test_an_empty_directory_will_do(tmp_path: Path):
    (tmp_path / "vm").mkdir()
    await stored.park(tmp_path / "vm")


def test_open_refuses_what_is_incomplete(tmp_path: Path):
    with pytest.raises(HostError, match="No such file"):
        Parked.open(tmp_path / "vm")
    with pytest.raises(HostError, match="not a parked VM"):
        Parked.open(tmp_path)
    stored.begin(tmp_path / "vm").close()
    with pytest.raises(HostError, match=r"is incomplete: .* resume that migration"):
        Parked.open(tmp_path / "vm")


async def test_a_later_process_goes_on(tmp_path: Path):
    path = tmp_path / "vm"
    with stored.begin(path) as parking:
        fd = parking.keep("received", 10)
        os.pwrite(fd, b"0123456789", 0)
        os.close(fd)
    with (path / receiving.NAME).open("ab") as file:
        file.write(b'{"name": "cut o')  # as a crash may leave it
    with Parking.reopen(path) as parking:
        assert [(b.name, b.length) for b in parking.blocks] == list(stored.BLOCKS)
        assert parking.kept == {"received": 10}
        fd = parking.open_kept("received")
        assert os.pread(fd, 10, 0) == b"0123456789"
        os.close(fd)
        assert (parking.configuration, parking.advised) == (stored.CONFIGURATION, True)
        assert parking.early == b"early"
        await parking.commit(stored.STATE, stored.TEXT, "running", stored.ORIGIN)
    with Parked.open(path) as parked:
        parked.verify()
        assert parked.description == stored.DESCRIPTION


@pytest.mark.parametrize(
    "line",
    [b"x", b"[]", b"5", b"{}", b'{"block": 5}', b'{"name": "a"}', b"[" * 99999],
)
def test_what_was_noted_is_checked(tmp_path: Path, line: bytes):
    stored.begin(tmp_path / "vm").close()
    with (tmp_path / "vm" / receiving.NAME).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(HostError, match=r"receiving is damaged .* remove"):
        Parking.reopen(tmp_path / "vm")


def test_kept_files(tmp_path: Path):
    with Parking.create(tmp_path / "vm") as parking:
        first = parking.keep("migration", 4)
        os.pwrite(first, b"old!", 0)
        second = parking.keep("migration", 8)
        assert os.pread(second, 9, 0) == bytes(8)
        assert os.pread(first, 4, 0) == b"old!"
        assert parking.kept == {"migration": 8}
        parking.forget("migration")
        parking.forget("migration")
        assert parking.kept == {}
        os.close(first)
        os.close(second)
        for name in ("", "../x", "A", "a" * 40, "a/b"):
            with pytest.raises(ValueError, match="not a name"):
                parking.keep(name, 1)


# --- locks ---------------------------------------------------------------------------


async def test_one_moves_it_many_clone_it(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    with Parked.open(path) as first, Parked.open(path) as second:
        first.lock(clone=True)
        second.lock(clone=True)
        second.lock(clone=False)
        second.lock(clone=False)
        with pytest.raises(HostError, match=r"served by another process.*--clone"):
            first.lock(clone=False)
        with Parked.open(path) as third:
            third.lock(clone=True)
            with pytest.raises(HostError, match="served by another process"):
                third.lock(clone=False)
    with Parked.open(path) as again:
        again.lock(clone=False)


async def test_the_mark(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    with Parked.open(path) as parked:
        parked.mark_running("tcp:10.0.0.2:4444")
    with Parked.open(path) as parked:
        assert parked.running is not None
        assert parked.running.endswith("at tcp:10.0.0.2:4444")
        parked.verify()
    for content in (b"", b"\xff\0\n", b"x" * 5000):
        (path / "running").write_bytes(content)
        with Parked.open(path) as parked:
            assert parked.running


async def test_the_working_set(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    pages = [5, 0, 1 << 48 | 4, 2 << 48]
    with Parked.open(path) as parked:
        parked.save_working_set(pages)
        assert parked.working_set == tuple(pages)
        parked.save_working_set([])
        assert parked.working_set == ()
        for wrong in (3 << 48, 2 << 48 | 1, stored.LENGTH // 4096):
            with pytest.raises(ValueError, match="not this VM's"):
                parked.save_working_set([wrong])
        parked.save_working_set([1] * (working_set.MAX_PAGES + 5))
        assert len(parked.working_set) == working_set.MAX_PAGES


async def test_a_damaged_working_set_is_none(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    for content in (b"", b"123", bytes(12), bytes(4) + b"x", bytes(1 << 24)):
        (path / "working-set").write_bytes(content)
        with Parked.open(path) as parked:
            if content != b"":
                with pytest.raises(HostError, match="working-set"):
                    parked.verify()
            assert parked.working_set == ()


# --- damage --------------------------------------------------------------------------


async def test_what_is_missing_or_cut_off_is_named(tmp_path: Path):
    path = await stored.park(tmp_path / "vm")
    for name in sorted({*os.listdir(path)} - {"description.json"}):
        file = path / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(HostError, match=name.replace("manifest.json", "manifest")):
            Parked.open(path)
        if content:
            file.write_bytes(content[:-1])
            with pytest.raises(HostError, match=f"{name}.*cut off"):
                Parked.open(path)
        file.write_bytes(content + b"x")
        if not name.startswith("ram-"):
            with pytest.raises(HostError, match=name):
                Parked.open(path)
        file.write_bytes(content)
    with Parked.open(path) as parked:
        parked.verify()


async def test_a_thousand_flips(tmp_path: Path):
    """Each is found and its file named; but for the text of the mark."""
    path = await stored.park(tmp_path / "vm")
    with Parked.open(path) as parked:
        parked.save_working_set([3, 2, 1])
        parked.mark_running("tcp:10.0.0.2:4444")
    sizes = {name: (path / name).stat().st_size for name in sorted(os.listdir(path))}
    dice = random.Random(11)
    harmless = 0
    for number in range(1000):
        # All files alike, not only the RAM; but every second one anywhere.
        names = [name for name, size in sizes.items() if size]
        weights = None if number % 2 else [sizes[name] for name in names]
        (name,) = dice.choices(names, weights)
        at, bit = dice.randrange(sizes[name]), 1 << dice.randrange(8)
        with _flipped(path / name, at, bit):
            if name == "running":
                harmless += 1
                with Parked.open(path) as parked:
                    parked.verify()
                    assert parked.running
                continue
            with pytest.raises(HostError, match=name) as raised:
                _open_and_verify(path)
            if name.startswith("ram-"):
                region = at // manifest.REGION * manifest.REGION
                assert f"offset {region:#x} " in str(raised.value)
    assert 0 < harmless < 100
    _open_and_verify(path)


def _open_and_verify(path: Path) -> None:
    with Parked.open(path) as parked:
        parked.verify()


class _flipped:
    def __init__(self, path: Path, at: int, bit: int) -> None:
        self._path, self._at, self._bit = path, at, bit

    def __enter__(self) -> None:
        self._flip()

    def __exit__(self, *_: object) -> None:
        self._flip()

    def _flip(self) -> None:
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self._at)
            (byte,) = file.read(1)
            file.seek(self._at)
            file.write(bytes([byte ^ self._bit]))


# --- crashes -------------------------------------------------------------------------

# Ends itself with SIGKILL at its Nth opening, renaming or removing of a file.
_CRASHING = """
import os, signal, sys
from pathlib import Path
import trio
from support import stored
from support.small_disk import in_small_disk, needs_mounts

def crash_at(number):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.scandir"):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

root, number = Path(sys.argv[1]), 1
while True:
    child = os.fork()
    if child == 0:
        crash_at(number)
        trio.run(stored.park, root / str(number))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(number)
        break
    number += 1
"""


def test_a_crash_at_any_moment(tmp_path: Path):
    """What is left is nothing, an incomplete one that can go on, or a whole VM."""
    (tmp_path / "program.py").write_text(_CRASHING)
    ran = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path],
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        check=True,
        timeout=200,
    )
    moments = int(ran.stdout)
    counts = {"nothing": 0, "incomplete": 0, "complete": 0}
    for number in range(1, moments + 1):
        path = tmp_path / str(number)
        if (path / manifest.NAME).exists():
            counts["complete"] += 1
            _open_and_verify(path)
            continue
        with pytest.raises(HostError, match=r"incomplete|not a parked|No such file"):
            Parked.open(path)
        if not (path / receiving.NAME).exists():
            counts["nothing"] += 1
            continue
        counts["incomplete"] += 1
        with Parking.reopen(path) as parking:
            if len(parking.blocks) == len(stored.BLOCKS) and parking.configuration:
                trio.run(parking.commit, stored.STATE, stored.TEXT, "running", "again")
                _open_and_verify(path)
    assert min(counts.values()) > 1, counts
    assert counts["incomplete"] > 20, counts


_DISCARDING = """
import os, signal, sys
from pathlib import Path
from common.store.directory import Parking
from support import stored

def crash_at(number):
    count = 0
    def hook(event, arguments):
        nonlocal count
        count += event == "os.remove"
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

root, number = Path(sys.argv[1]), 0
child = -1
while child:
    number += 1
    parking = stored.begin(root / str(number))
    for name in ("received", "incoming"):
        os.close(parking.keep(name, 4096))
    child = os.fork()
    if child == 0:
        crash_at(number)
        parking.discard()
        os._exit(0)
    parking.close()
    if os.waitpid(child, 0)[1] == 0:
        print(number)
        break
"""


def test_a_crash_while_it_is_discarded(tmp_path: Path):
    """It can be gone on with, or the place can be used again at once."""
    (tmp_path / "program.py").write_text(_DISCARDING)
    ran = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path],
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        check=True,
        timeout=100,
    )
    again = 0
    for number in range(1, int(ran.stdout)):
        path = tmp_path / str(number)
        if Parking.is_left(path):
            Parking.reopen(path).close()
            again += 1
        else:
            Parking.create(path, anew=True).close()
    assert again > 1
    assert int(ran.stdout) - again > 3


async def test_cancelled(tmp_path: Path):
    with stored.begin(tmp_path / "vm") as parking:
        with trio.CancelScope() as scope:
            scope.cancel()
            await parking.commit(stored.STATE, stored.TEXT, "running", "")
        assert scope.cancelled_caught
        with pytest.raises(HostError, match="is incomplete"):
            Parked.open(tmp_path / "vm")
        await parking.commit(stored.STATE, stored.TEXT, "running", "")
    _open_and_verify(tmp_path / "vm")


# --- a full disk ---------------------------------------------------------------------

_FILLING = """
import sys, trio
from pathlib import Path
from common.errors import HostError
from common.store.directory import Parked
from support import stored
from support.small_disk import in_small_disk, needs_mounts
path = Path(sys.argv[1]) / "vm"
try:
    trio.run(stored.park, path)
except (HostError, OSError) as error:
    print("refused:", error)
try:
    with Parked.open(path) as parked:
        parked.verify()
        print("whole")
except HostError as error:
    print("not whole:", error)
"""


@needs_mounts
def test_a_full_disk(tmp_path: Path):
    """However small it is: an error, and nothing that looks like a VM."""
    (tmp_path / "program.py").write_text(_FILLING)
    words = []
    for kilobytes in range(40, 480, 40):
        said = in_small_disk(tmp_path, kilobytes, tmp_path / "program.py")
        if "refused:" in said:
            assert "No space left" in said, said
            assert "not whole:" in said
        else:
            assert said == "whole\n"
        words.append(said.split(":")[0].strip())
    assert words.count("refused") > 2
    assert words.count("whole") > 1
    assert words == sorted(words), "once there is room, there is room"


async def test_a_full_disk_in_the_end(tmp_path: Path):
    """The manifest is there and its name cannot be made durable: it goes again."""
    with stored.begin(tmp_path / "vm") as parking:
        (tmp_path / "vm" / "manifest.json.new").mkdir()
        with pytest.raises(HostError, match="Is a directory"):
            await parking.commit(stored.STATE, stored.TEXT, "running", "")
        (tmp_path / "vm" / "manifest.json.new").rmdir()
        with pytest.raises(HostError, match="is incomplete"):
            Parked.open(tmp_path / "vm")
        await parking.commit(stored.STATE, stored.TEXT, "running", "")
    _open_and_verify(tmp_path / "vm")


def test_receiving_is_readable(tmp_path: Path):
    stored.begin(tmp_path / "vm").close()
    lines = (tmp_path / "vm" / receiving.NAME).read_text().splitlines()
    assert json.loads(lines[0]) == {"boot": receiving.this_boot().boot}
    assert json.loads(lines[1]) == {"advised": True}
    assert json.loads(lines[2])["name"] == "pc.ram"
