"""Who may import whom: reads every import of the four packages, runs none.

            srcd        dstd                        never each other
               \\        /
       common.guest   common.host, common.qmp.server, common.qmp.client
            |
    common.channel   common.native
            |
    common.stream, common.qmp.{lexer,message,session,schema}, common.status,
    common.errors                                   standard library, ujson

Arrows point down only.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("srcd", "dstd", "common", "qmp_schema")
BOTTOM = (
    "common.stream",
    "common.qmp.lexer",
    "common.qmp.message",
    "common.qmp.session",
    "common.qmp.schema",
    "common.status",
    "common.errors",
)
# What would give the bottom row a network, a thread or a system call.
WORLD = (
    "trio",
    "cffi",
    "os",
    "socket",
    "select",
    "selectors",
    "signal",
    "subprocess",
    "threading",
    "multiprocessing",
    "asyncio",
    "concurrent",
    "ctypes",
    "mmap",
    "fcntl",
)
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "types", "base"}
ALLOWED = {"common.guest.base"}  # the interface every guest has


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, a module or a name in one."""

    module: str
    target: str

    def reaches(self, *prefixes: str) -> bool:
        return is_in(self.target, *prefixes)

    def __str__(self) -> str:
        return f"{self.module} imports {self.target}"


def is_in(name: str, *prefixes: str) -> bool:
    return any(name == one or name.startswith(one + ".") for one in prefixes)


def package_roots() -> list[tuple[str, Path]]:
    """The packages where the tests find them: installed, or in the checkout."""
    roots = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.submodule_search_locations is not None, package
        roots += [(package, Path(at)) for at in spec.submodule_search_locations]
    return roots


def all_modules() -> dict[str, Path]:
    modules = {}
    for package, root in package_roots():
        for path in root.rglob("*.py"):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def imports_of(module: str, source: str) -> list[Import]:
    """Every import, also those inside functions and for annotations alone."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(module, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            found += [
                Import(module, f"{node.module}.{alias.name}") for alias in node.names
            ]
    return found


MODULES = all_modules()
IMPORTS = [
    one
    for module, path in MODULES.items()
    for one in imports_of(module, path.read_text("utf-8"))
]


def test_there_is_something_to_read():
    assert {"common.stream.ram", "common.status", "common.errors", "srcd", "dstd"} <= (
        MODULES.keys()
    )
    assert Import("common.stream.ram", "common.stream.fields") in IMPORTS


# Each rule: whom it binds, and what they may not reach.
RULES = {
    "srcd and dstd never import each other": [
        (("srcd",), ("dstd",)),
        (("dstd",), ("srcd",)),
    ],
    "common never imports a daemon": [(("common",), ("srcd", "dstd"))],
    "the bottom row touches no world": [(BOTTOM, WORLD)],
    "common.qmp knows nothing of migration": [
        (
            ("common.qmp",),
            ("common.guest", "common.stream", "common.native", "common.channel"),
        )
    ],
    "common.channel and common.native are below guest, host and the servers": [
        (
            ("common.channel", "common.native"),
            ("common.guest", "common.host", "common.qmp.server", "common.qmp.client"),
        )
    ],
    "the schema is data": [(("qmp_schema",), ("common", "srcd", "dstd"))],
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    broken = [
        str(one)
        for bound, forbidden in RULES[rule]
        for one in IMPORTS
        if is_in(one.module, *bound) and one.reaches(*forbidden)
    ]
    assert broken == []


def test_the_bottom_row_stands_on_itself():
    """Of ours it reaches its own row; only common.qmp.schema the schema's data."""
    broken = [
        str(one)
        for one in IMPORTS
        if is_in(one.module, *BOTTOM)
        and one.reaches(*PACKAGES)
        and not one.reaches(*BOTTOM)
        and not (one.module == "common.qmp.schema" and one.reaches("qmp_schema"))
    ]
    assert broken == []


def test_the_bottom_row_needs_no_third_party():
    broken = [
        str(one)
        for one in IMPORTS
        if is_in(one.module, *BOTTOM)
        and one.target.split(".")[0] not in {*PACKAGES, *sys.stdlib_module_names}
        and not (one.module == "common.qmp.message" and one.reaches("ujson"))
    ]
    assert broken == []


def test_json_in_one_place():
    assert {one.module for one in IMPORTS if one.reaches("ujson")} <= {
        "common.qmp.message"
    }


def test_the_schema_is_read_in_one_place():
    readers = {one.module for one in IMPORTS if one.reaches("qmp_schema")}
    assert {one for one in readers if not is_in(one, "qmp_schema")} <= {
        "common.qmp.schema"
    }


def test_modules_are_named_after_things():
    """A drawer is where the next thing without a name goes."""
    drawers = [
        module
        for module in MODULES
        if module.rpartition(".")[2] in DRAWERS and module not in ALLOWED
    ]
    assert drawers == []


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("import trio", ["trio"]),
        ("import os.path as p, socket", ["os.path", "socket"]),
        (
            "from common.stream import ram, bitmap",
            ["common.stream.ram", "common.stream.bitmap"],
        ),
        ("def f():\n    from dstd import incoming", ["dstd.incoming"]),
        ("if TYPE_CHECKING:\n    import ujson", ["ujson"]),
    ],
)
def test_no_import_is_overlooked(source, targets):
    """The rules are only as good as the reading."""
    assert [one.target for one in imports_of("m", source)] == targets


def test_prefixes_are_whole_names():
    assert is_in("common.stream.ram", "common.stream")
    assert is_in("common.stream", "common.stream")
    assert not is_in("common.streams", "common.stream")
    assert not is_in("osmosis", "os")
