"""Both command lines: what is taken, and usage errors that say what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import dstd.cli
import srcd.cli
from common.config import GuestConfig, ServeConfig
from common.guest.parked import RamFile, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

BOTH = pytest.mark.parametrize("parse", [srcd.cli.parse, dstd.cli.parse])
QMP = ["serve", "--qmp", "q"]


def test_source() -> None:
    words = [*QMP, "--qmp", "r", "--name", "vm", "--memory", "1G", "--vcpus", "8"]
    words += ["--hugepages", "2M", "--accel", "kvm", "--serial", "file:s"]
    words += ["--machine", "m", "--kernel", "k.elf", "--append", "a b", "--paused"]
    assert srcd.cli.parse(words) == ServeConfig(
        guest=GuestConfig(
            name="vm",
            ram=(),
            socket=None,
            machine="m",
            memory=1 << 30,
            vcpus=8,
            accel="kvm",
            hugepages="2M",
            kernel="k.elf",
            append="a b",
            serial="file:s",
            paused=True,
        ),
        qmp=("q", "r"),
    )


def test_source_has_a_guest_program() -> None:
    guest = srcd.cli.parse([*QMP, "--memory", "64M"]).guest
    assert guest.kernel is not None
    assert guest.kernel.endswith("test-guest.elf")


def test_destination() -> None:
    words = [*QMP, "--guest", "g", "--incoming", "tcp::0", "--place", "copy"]
    config = dstd.cli.parse([*words, "--overcommit"])
    assert (config.incoming, config.copy, config.overcommit) == ("tcp::0", True, True)
    assert config.guest.socket == "g"
    assert config.guest.kernel is None
    plain = dstd.cli.parse([*QMP, "--guest", "g"])
    assert (plain.incoming, plain.copy, plain.overcommit) == ("defer", False, False)


@BOTH
def test_parked(parse: Callable[[list[str]], ServeConfig]) -> None:
    guest = parse([*QMP, "--ram", "a=/x,size=4K", "--ram", "b=/y"]).guest
    assert guest.ram == (
        RamFile(idstr="a", path="/x", size=4096),
        RamFile(idstr="b", path="/y", size=None),
    )


@BOTH
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "required: verb"),
        (["dance"], "invalid choice: 'dance'"),
        (["serve", "--memory", "1M"], "required: --qmp"),
        (QMP, "give one of --memory, --ram, --guest and --park"),
        ([*QMP, "--memory", "1M", "--guest", "g"], "give one of --memory"),
        ([*QMP, "--ram", "a=b", "--guest", "g"], "give one of --memory"),
        ([*QMP, "--memory", "1M", "--peer-timeout", "-1"], "must be 0 to 3600"),
        ([*QMP, "--memory", "1M", "--peer-timeout", "x"], "invalid int value"),
        ([*QMP, "--memory", "much"], "not a size: 'much'"),
        ([*QMP, "--memory", "-1M"], "expected one argument"),
        ([*QMP, "--memory", "1M", "--vcpus", "0"], "--vcpus must be 1 to 8"),
        ([*QMP, "--memory", "1M", "--vcpus", "9"], "--vcpus must be 1 to 8"),
        ([*QMP, "--memory", "1M", "--vcpus", "two"], "invalid int value: 'two'"),
        ([*QMP, "--memory", "1M", "--hugepages", "1G"], "invalid choice: '1G'"),
        ([*QMP, "--memory", "1M", "--accel", "tcg"], "invalid choice: 'tcg'"),
        ([*QMP, "--memory", "1M", "--serial", "x"], "must be stdout or file:PATH"),
        ([*QMP, "--ram", "a"], "not NAME=FILE[,size=SIZE]: 'a'"),
        ([*QMP, "--ram", "=b"], "not NAME=FILE"),
        ([*QMP, "--ram", "a="], "not NAME=FILE"),
        ([*QMP, "--ram", "a=b,size=x"], "not a size: 'x'"),
        ([*QMP, "--ram", f"{'a' * 256}=b"], "not NAME=FILE"),
    ],
)
def test_usage_errors(
    parse: Callable[[list[str]], ServeConfig],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    text: str,
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_bad_incoming(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dstd.cli.parse([*QMP, "--guest", "g", "--incoming", "tcp:nowhere"])
    assert "error parsing address 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7b", 7),
        ("4k", 4096),
        ("2M", 2 << 20),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "1.5G", " 1", "1 M", "1MB", "0x10", "1" * 16]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)
