"""Command lines as people write them for a shell, and as a shell takes them."""

from __future__ import annotations

import re
import shlex
from typing import Final

MAX_COMMAND: Final = 4 << 20  # bytes; Linux starts no program with more by default

_WORDS: Final = re.compile(
    r"""(?P<space>[ \t]+|\\\n)
      | \\(?P<escaped>[^\n])
      | '(?P<single>[^']*)'
      | "(?P<double>(?:\\.|[^"\\$`])*)"
      | (?P<plain>[^\s'"\\|;&<>()`$]+)""",
    re.DOTALL | re.VERBOSE,
)
_IN_DOUBLE: Final = re.compile(r'\\([\\"$`]|\n)')


class ShellError(ValueError):
    """Text that is no command line; one sentence."""


def words_untrusted(text: bytes) -> list[str]:
    """The words of one command: as a shell reads them, or each ended by a zero byte.

    The latter is what /proc/PID/cmdline has. ShellError for what only a shell
    could know: variables, redirections, several commands.
    """
    if len(text) > MAX_COMMAND:
        raise ShellError(f"{len(text)} bytes are no command line")
    if b"\0" in text:
        words = text.removesuffix(b"\0").decode(errors="surrogateescape").split("\0")
    else:
        line = text.decode(errors="surrogateescape")
        # A space at the end may be a word of its own, behind a backslash.
        words = _split(line.lstrip().rstrip("\r\n"))
    if not words or not words[0]:
        raise ShellError("the command line is empty")
    if words[0].startswith("-"):
        raise ShellError(
            f"the command line begins with the option {words[0][:40]!a}; it has to"
            " begin with the program"
        )
    return words


def quote(word: str) -> str:
    """So that a shell makes this word of it; on a terminal it does no harm."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escape, word))}'"


def _escape(letter: str) -> str:
    if letter in "\\'":
        return "\\" + letter
    if letter.isprintable():
        return letter
    # Three digits: no letter behind them can be taken for one more.
    return "".join(f"\\{byte:03o}" for byte in letter.encode(errors="surrogateescape"))


def _split(text: str) -> list[str]:
    words: list[str] = []
    at, within = 0, False
    while at < len(text):
        found = _WORDS.match(text, at)
        if not found:
            raise ShellError(_why_not(text, at))
        at = found.end()
        if found["space"] is not None:
            # A line that goes on does not end a word, white space does.
            within = within and found["space"] == "\\\n"
            continue
        if not within:
            words.append("")
        words[-1] += _unquoted(found)
        within = True
    return words


def _unquoted(found: re.Match[str]) -> str:
    if found["double"] is not None:
        return _IN_DOUBLE.sub(
            lambda one: one[1].removeprefix("\n"),
            found["double"],
        )
    return found[found.lastgroup or 0] or ""


def _why_not(text: str, at: int) -> str:
    letter = text[at]
    rest = ascii(text[at : at + 20])
    if letter == "'" or (letter == '"' and not _expands(text, at)):
        return f"the quote before {rest} is not closed"
    if letter == "\\":
        return "the command line ends with a backslash"
    if letter in "\n\r\v\f":
        return (
            "the command line has several lines; end all but the last with a"
            " backslash, or give /proc/PID/cmdline of the running QEMU"
        )
    return (
        f"only a shell knows what {rest} becomes; give the command line without it,"
        " or /proc/PID/cmdline of the running QEMU"
    )


def _expands(text: str, at: int) -> bool:
    """Whether a variable is what ends this quote too early."""
    plain = re.compile(r'"(?:\\.|[^"\\$`])*', re.DOTALL).match(text, at)
    return plain is not None and text[plain.end() : plain.end() + 1] in ("$", "`")
