"""`srcd recover` and the scripts of docs/recovery.md, run as an operator would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    Run: TypeAlias = "subprocess.CompletedProcess[str]"
    Begun: TypeAlias = "subprocess.Popen[str]"

PROGRAMS = Path(sys.executable).parent
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
# What stands for ssh: no other host is needed, but its name and a shell are.
SSH = 'sh -c "echo to $0 >&2; exec sh -c \\"$1\\""'
PATIENCE = 90.0


def run(*words: str, **environment: str) -> Run:
    """To its end, with the daemons' programs in the path."""
    return subprocess.run(
        words,
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def begin(*words: str) -> Begun:
    """Likewise; its output can be read while it runs."""
    return subprocess.Popen(
        words,
        env=_environment({"PYTHONUNBUFFERED": "1"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", **more}


def recover(qmp: object, peer: object, *words: str, **environment: str) -> Run:
    """`srcd recover`."""
    where = ("--qmp", str(qmp), "--peer", str(peer))
    return run("srcd", "recover", *where, *words, **environment)


INTERPRETERS = {"recover.sh": ("sh",), "recover.py": (sys.executable,)}


def by_shell(
    qmp: object, peer: object, uri: str, start: Callable[..., Any] = run
) -> Any:
    """The script leaves to its reader how to get to the sockets."""
    leads = [f"srcd proxy --qmp {path}" for path in (qmp, peer)]
    return start(*INTERPRETERS["recover.sh"], str(EXAMPLES / "recover.sh"), *leads, uri)


def by_python(
    qmp: object, peer: object, uri: str, start: Callable[..., Any] = run
) -> Any:
    script = str(EXAMPLES / "recover.py")
    return start(*INTERPRETERS["recover.py"], script, str(qmp), str(peer), uri)


SCRIPTS = {"recover.sh": by_shell, "recover.py": by_python}
