"""The configuration file: options in TOML, described by qmp_schema/config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import dstd.cli
import srcd.cli
from common.config import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, text: str) -> list[str]:
    file = folder / "config.toml"
    file.write_text(text)
    return ["serve", "--config", str(file)]


def test_a_file_is_enough(tmp_path: Path) -> None:
    text = """
        qmp = ["q", "r"]
        memory = "1G"
        vcpus = 2
        paused = true
        preempt-early = false
        [parameters]
        max-bandwidth = 5
    """
    config = srcd.cli.parse(written(tmp_path, text))
    assert config.qmp == ("q", "r")
    assert (config.guest.memory, config.guest.vcpus) == (1 << 30, 2)
    assert config.guest.paused
    assert not config.preempt_early
    assert config.parameters == {"max-bandwidth": 5}


def test_the_command_line_wins(tmp_path: Path) -> None:
    words = written(tmp_path, 'qmp = ["q"]\nmemory = "1G"\nincoming = "tcp::1"')
    config = dstd.cli.parse([*words, "--memory", "2G", "--incoming", "defer"])
    assert (config.guest.memory, config.incoming) == (2 << 30, "defer")


REFUSED = {
    "nonsense": "Expected",
    'memory = "1G"\nx = 1': "Parameter 'x' is unexpected",
    "memory = 1": "Invalid parameter type for 'memory', expected: string",
    'qmp = "q"': "Invalid parameter type for 'qmp', expected: array",
    'accel = "fast"': "Parameter 'accel' does not accept value 'fast'",
    'incoming = "tcp::1"': "Parameter 'incoming' is unexpected",
    "parameters = 1": "Invalid parameter type for 'parameters', expected: object",
    "[parameters]\nmax_bandwidth = 1": "Parameter 'parameters.max_bandwidth'",
    "[parameters]\ndowntime-limit = 2000001": "Parameter 'downtime_limit' expects",
    "[recovery]\nauto = 1": "Invalid parameter type for 'recovery.auto', expected",
    "[recovery]\ngreatest-delay = 0": "expects a value between 1 and 3600",
    "recovery = true": "Invalid parameter type for 'recovery', expected: object",
    'memory = "much"': "argument --memory",
}


MEANT = {
    'memmory = "1G"': "'memmory' is unexpected; did you mean 'memory'?",
    "max-bandwidth = 0": "is unexpected; it belongs into the table [parameters]",
    "[parameters]\nmax-bandwith = 0": "; did you mean 'max-bandwidth'?",
    "[recovery]\natempts = 1": "is unexpected; did you mean 'attempts'?",
    "xyzzy = 1": "'xyzzy' is unexpected; see srcd serve --help",
}
REFUSED |= MEANT


@pytest.mark.parametrize("text", REFUSED)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    words = [*written(tmp_path, text), "--qmp", "q"]
    with pytest.raises(SystemExit, match="2"):
        srcd.cli.parse(words)
    assert REFUSED[text] in capsys.readouterr().err


def test_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        dstd.cli.parse(["serve", "--config", "/nowhere/x"])
    assert "No such file or directory" in capsys.readouterr().err


def test_a_file_alone(tmp_path: Path) -> None:
    """In a unit the service manager makes the control socket."""
    path = written(tmp_path, 'memory = "1G"')[-1]
    asked = srcd.cli.parse(["check-config", path])
    assert (asked.about, asked.path) == ("check-config", path)
    assert asked.config.guest.memory == 1 << 30
    assert dstd.cli.parse(["check", "--config", path]).about == "check"
    assert dstd.cli.parse(["check"]).config is None


def test_a_file_that_is_wrong_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, 'memory = "1G"\nguest = "g"')[-1]
    with pytest.raises(SystemExit, match="2"):
        dstd.cli.parse(["check-config", path])
    assert "give one of --memory, --ram, --guest and --park" in capsys.readouterr().err


def test_a_file_is_read_again(tmp_path: Path) -> None:
    words = written(tmp_path, 'memory = "1G"\n[parameters]\nmax-bandwidth = 1')
    file = dstd.cli.parse([*words, "--qmp", "q"]).file
    written(tmp_path, 'memory = "1G"\n[parameters]\nmax-bandwidth = 2')
    assert file.again().parameters == {"max-bandwidth": 2}
    assert file.again().options == file.options
    written(tmp_path, "memory = ")
    with pytest.raises(ConfigError, match=r"config\.toml: Invalid value"):
        file.again()
