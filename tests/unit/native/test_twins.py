"""The C code and its Python twins: the same names, and the same bytes."""

from __future__ import annotations

import ast
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.native._native import ffi, lib
from common.native.loop import check
from common.native.ram import Ram
from common.stream import constants as c
from common.stream import fields, section
from common.stream import ram as records

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
NATIVE = ROOT / "common" / "native"
PAGE = 4096
PAGES = 16


# --- names ------------------------------------------------------------------------


def declared() -> set[str]:
    """Functions, enumerators and constants of the cdef."""
    text = re.sub(
        r"/\*.*?\*/", "", (NATIVE / "_native.cdef.txt").read_text(), flags=re.S
    )
    functions = re.findall(r"\b(\w+)\([^;{}]*\);", text)
    constants = re.findall(r"#define (\w+)", text)
    enumerators = [
        name
        for body in re.findall(r"enum \w+ \{([^}]*)\}", text)
        for name in re.findall(r"\w+", body)
    ]
    return {*functions, *constants, *enumerators}


def stubbed() -> set[str]:
    tree = ast.parse((NATIVE / "_native.pyi").read_text())
    (lib_class,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "_Lib"
    )
    names = set()
    for node in lib_class.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_the_stub_names_what_the_cdef_declares() -> None:
    assert len(declared()) > 70
    assert stubbed() == declared()


def test_the_library_has_what_the_cdef_declares() -> None:
    assert declared() <= set(dir(lib))


def test_equal_constants() -> None:
    assert lib.WIRE_HEADER_MAX == 8 + 1 + c.MAX_NAME + 1
    assert ffi.sizeof(ffi.new("struct rp_message *").payload) == c.MAX_RP_PAYLOAD


# --- bytes ------------------------------------------------------------------------


class Block:
    """RAM of a few pages in a memfd."""

    page_size = PAGE
    length = PAGES * PAGE
    base = 0
    start = 0

    def __init__(self, idstr: str) -> None:
        self.idstr = idstr
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, self.length)


IDSTRS = ("ram", "pc.bios", "/objects/ram-0", "é" * 127 + "x")


@pytest.fixture(scope="module")
def table() -> Iterator[Ram]:
    blocks = [Block(idstr) for idstr in IDSTRS]
    ram = Ram(blocks)
    yield ram
    ram.close()
    for block in blocks:
        os.close(block.fd)


RECORDS = st.lists(
    st.tuples(
        st.sampled_from(range(len(IDSTRS))), st.integers(0, PAGES - 1), st.booleans()
    ),
    max_size=40,
)
Records = list[tuple[int, int, bool]]


def encoded_in_c(table: Ram, chosen: Records) -> bytes:
    last = ffi.new("const struct ram_block **")
    out = ffi.new("uint8_t[]", int(lib.WIRE_HEADER_MAX))
    encoded = b""
    for index, page, zero in chosen:
        block = ffi.addressof(table.native.blocks[index])
        size = lib.wire_put_record(out, block, page * PAGE, zero, last)
        encoded += bytes(ffi.buffer(out, size))
        encoded += b"" if zero else content(index, page)
    return encoded


def encoded_in_python(chosen: Records) -> bytes:
    writer = records.RecordWriter()
    return b"".join(
        writer.zero(IDSTRS[index], page * PAGE)
        if zero
        else writer.page(IDSTRS[index], page * PAGE, content(index, page))
        for index, page, zero in chosen
    )


def content(index: int, page: int) -> bytes:
    return bytes([index + 1, page + 1]) * (PAGE // 2)


@given(chosen=RECORDS)
def test_same_records_same_bytes(table: Ram, chosen: Records) -> None:
    assert encoded_in_c(table, chosen) == encoded_in_python(chosen)


@given(chosen=RECORDS)
def test_python_reads_what_c_wrote(table: Ram, chosen: Records) -> None:
    wire = encoded_in_c(table, chosen)
    read = fields.over(wire)
    lengths = dict.fromkeys(IDSTRS, Block.length)
    reader = records.RecordReader(read, lengths)
    for index, page, zero in chosen:
        record = reader.next_untrusted()
        assert (record.offset, record.block) == (page * PAGE, IDSTRS[index])
        assert isinstance(record, records.Zero if zero else records.Page)
    assert read.offset == len(wire)


class Destination:
    """The C loader in front of RAM that nobody runs on."""

    def __init__(self) -> None:
        self.blocks = [Block(idstr) for idstr in IDSTRS]
        self.ram = Ram(self.blocks)
        self.native = ffi.new("struct destination *")
        check(lib.ram_prepare_destination(self.ram.native, -1))
        none: Any = ffi.NULL
        ram, way = self.ram.native, lib.PLACE_FILE
        check(lib.destination_open(self.native, ram, way, -1, none, 0))

    def load(self, wire: bytes) -> int:
        """Give it to the main channel's loop; the byte that it stopped at."""
        ours, theirs = socket.socketpair()
        stop = os.eventfd(0)
        channel = ffi.new("struct channel *")
        loader = ffi.new("struct loader *")
        with ours, theirs:
            check(lib.channel_open(channel, theirs.fileno(), stop))
            check(lib.loader_open(loader, self.native, channel, False))
            loader.section_id = c.RAM_SECTION_ID
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            ours.sendall(wire)
            check(lib.load_main(loader))
            lib.loader_close(loader)
            lib.channel_close(channel)
        os.close(stop)
        return int(loader.next)

    def page(self, index: int, page: int) -> bytes:
        return os.pread(self.blocks[index].fd, PAGE, page * PAGE)

    def close(self) -> None:
        lib.destination_close(self.native)
        self.ram.close()
        for block in self.blocks:
            os.close(block.fd)


@given(chosen=RECORDS)
def test_c_loads_what_python_wrote(chosen: Records) -> None:
    body = encoded_in_python(chosen) + records.encode(records.Eos())
    part = section.encode_section(section.Part(section_id=c.RAM_SECTION_ID), body)
    destination = Destination()
    try:
        assert destination.load(part + section.EOF) == c.QEMU_VM_EOF
        for (index, page), zero in {(i, p): zero for i, p, zero in chosen}.items():
            wanted = bytes(PAGE) if zero else content(index, page)
            assert destination.page(index, page) == wanted
        zeroes = int(destination.native.stats.zero_pages)
        assert zeroes == sum(zero for _, _, zero in chosen)
        assert int(destination.native.stats.precopy_pages) == len(chosen)
    finally:
        destination.close()
