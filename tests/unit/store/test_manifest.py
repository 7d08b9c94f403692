"""The manifest: what is written is read back, and nothing else is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.native._native import lib
from common.store import manifest
from common.store.manifest import Block, File, Manifest, ManifestError
from common.stream import constants as c

BLOCKS = (
    Block(name="pc.ram", length=1 << 30, page_size=4096, file="ram-0000"),
    Block(name='Ü/rom@"x"', length=2 << 20, page_size=2 << 20, file="ram-0001"),
    Block(name="z", length=8192, page_size=4096, file="image", offset=1 << 20),
)
SAMPLE = Manifest(
    machine="pc-q35-10.0",
    blocks=BLOCKS,
    advised=True,
    run_state="paused",
    origin="10.0.0.1 port 4444",
    created="2026-01-02T03:04:05Z",
    devices=("timer", "cpu"),
    files={
        "configuration": File(20, 0),
        "early-state": File(0, 0),
        "device-state": File(1 << 20, 0xFFFFFFFF),
        "checksums": File(
            sum(manifest.checksums_size(block.length) for block in BLOCKS), 1
        ),
    },
)


def sealed(document: dict[str, Any]) -> bytes:
    """A manifest of these members whose own checksum is right."""
    body = json.dumps(document, indent=1).encode().removesuffix(b"\n}")
    digest = hashlib.sha256(body).hexdigest()
    return body + f',\n "sha256": "{digest}"\n}}\n'.encode()


def members() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(manifest.encode(SAMPLE))
    del document["sha256"]
    return document


def test_round_trip():
    assert manifest.decode_untrusted(manifest.encode(SAMPLE)) == SAMPLE


def test_it_is_json_and_ascii():
    document = json.loads(manifest.encode(SAMPLE).decode("ascii"))
    assert document["blocks"][1]["name"] == BLOCKS[1].name
    assert list(document)[-1] == "sha256"


def test_the_c_side_has_the_same_region():
    assert manifest.REGION == lib.CHECKSUM_REGION


@given(
    st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=60),
    st.integers(1, 1 << 30),
)
def test_any_name_survives(name: str, pages: int):
    block = Block(name=name, length=pages * 4096, page_size=4096, file="ram-0000")
    files = dict(SAMPLE.files)
    files["checksums"] = File(manifest.checksums_size(block.length), 7)
    whole = dataclasses.replace(SAMPLE, blocks=(block,), files=files)
    assert manifest.decode_untrusted(manifest.encode(whole)) == whole


def test_every_cut_is_refused():
    text = manifest.encode(SAMPLE)
    for length in range(len(text)):
        with pytest.raises(ManifestError):
            manifest.decode_untrusted(text[:length])
    with pytest.raises(ManifestError):
        manifest.decode_untrusted(text + b"\n")


def test_every_flip_is_refused():
    text = manifest.encode(SAMPLE)
    for at in range(len(text)):
        for bit in range(8):
            broken = bytearray(text)
            broken[at] ^= 1 << bit
            with pytest.raises(ManifestError):
                manifest.decode_untrusted(bytes(broken))


WRONG: dict[str, tuple[str, Any, str]] = {
    "another format": ("format", "x", "not that of a parked VM"),
    "a later version": ("version", 2, "another release"),
    "no machine": ("machine", 5, "machine is not a text"),
    "a long machine": ("machine", "m" * 257, "machine is not a text"),
    "advised": ("advised", 1, "neither true nor false"),
    "run state": ("run-state", None, "run-state is not a text"),
    "devices": ("devices", {}, "devices is not a list"),
    "a device": ("devices", [5], "device is not a text"),
    "blocks": ("blocks", None, "blocks is not a list"),
    "too many blocks": ("blocks", [{}] * (c.MAX_BLOCKS + 1), "blocks is not a list"),
    "a block": ("blocks", [5], "a RAM block is not an object"),
    "files": ("files", [], "files is not an object"),
    "a member more": ("colour", "red", "'colour' does not belong there"),
}


@pytest.mark.parametrize("name", WRONG)
def test_members_are_checked(name: str):
    member, value, words = WRONG[name]
    with pytest.raises(ManifestError, match=words):
        manifest.decode_untrusted(sealed(members() | {member: value}))


@pytest.mark.parametrize("name", sorted(members()))
def test_no_member_may_be_missing(name: str):
    document = members()
    del document[name]
    with pytest.raises(ManifestError):
        manifest.decode_untrusted(sealed(document))


WRONG_BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "1 to 255 bytes"),
    "a long name": ({"name": "ü" * 128}, "1 to 255 bytes"),
    "a control character": ({"name": "a\nb"}, "not text"),
    "a surrogate": ({"name": "\ud800"}, "not text"),
    "no length": ({"length": 0}, "not made of whole pages"),
    "half a page": ({"length": 2048}, "not made of whole pages"),
    "a negative length": ({"length": -4096}, "not within"),
    "a huge length": ({"length": 1 << 53}, "not within"),
    "a length that is none": ({"length": True}, "not a number"),
    "a fraction": ({"length": 4096.0}, "not a number"),
    "a page of 3 KiB": ({"page-size": 3072}, "no page has"),
    "a page of nothing": ({"page-size": 0}, "no page has"),
    "an odd offset": ({"offset": 5}, "not made of whole pages"),
    "a path": ({"file": "../ram-0000"}, "no name of a RAM file"),
    "another path": ({"file": "/etc/shadow"}, "no name of a RAM file"),
    "a line more": ({"file": "ram-0000\n"}, "no name of a RAM file"),
    "digits of elsewhere": ({"file": "ram-٠٠٠٠"}, "no name of a RAM file"),
    "something else": ({"colour": 1}, "does not belong"),
}


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_blocks_are_checked(name: str):
    changes, words = WRONG_BLOCKS[name]
    document = members()
    document["blocks"][0] |= changes
    with pytest.raises(ManifestError, match=words):
        manifest.decode_untrusted(sealed(document))


def test_blocks_have_different_names():
    document = members()
    document["blocks"][1]["name"] = document["blocks"][0]["name"]
    with pytest.raises(ManifestError, match="there twice"):
        manifest.decode_untrusted(sealed(document))


WRONG_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"passwd": {"size": 1, "crc32c": "00000000"}}, "does not belong"),
    "no size": ({"vmdesc": {"crc32c": "00000000"}}, "'size' is missing"),
    "short digits": ({"vmdesc": {"size": 1, "crc32c": "0"}}, "no CRC32C"),
    "no digits": ({"vmdesc": {"size": 1, "crc32c": "0000000G"}}, "no CRC32C"),
    "a huge file": ({"vmdesc": {"size": 1 << 31, "crc32c": "00000000"}}, "within"),
    "checksums": ({"checksums": {"size": 4, "crc32c": "00000000"}}, "need"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_are_checked(name: str):
    changes, words = WRONG_FILES[name]
    document = members()
    document["files"] |= changes
    with pytest.raises(ManifestError, match=words):
        manifest.decode_untrusted(sealed(document))


@pytest.mark.parametrize("name", manifest.NEEDED)
def test_needed_files_are_listed(name: str):
    document = members()
    del document["files"][name]
    with pytest.raises(ManifestError, match=f"does not list {name}"):
        manifest.decode_untrusted(sealed(document))


def test_a_member_that_is_there_twice():
    body = manifest.encode(SAMPLE).split(b',\n "sha256"')[0]
    body = body.replace(b'"advised": true', b'"advised": true, "advised": false')
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(ManifestError, match="there twice"):
        manifest.decode_untrusted(body + f',\n "sha256": "{digest}"\n}}\n'.encode())


def test_what_is_no_json_at_all():
    for body in (b"", b"\xff" * 40, b"[" * 100_000, b'{"a": NaN', b"{" * 20):
        digest = hashlib.sha256(body).hexdigest()
        with pytest.raises(ManifestError):
            manifest.decode_untrusted(body + f',\n "sha256": "{digest}"\n}}\n'.encode())


def test_the_largest_there_can_be_is_within_the_limit():
    blocks = tuple(
        Block(
            name=f"{number:05d}".ljust(127, "ÿ"),
            length=1 << 40,
            page_size=4096,
            file=manifest.block_file(number),
            offset=1 << 60,
        )
        for number in range(c.MAX_BLOCKS)
    )
    assert len(manifest.encode(dataclasses.replace(SAMPLE, blocks=blocks))) < (
        manifest.MAX_SIZE
    )
    with pytest.raises(ManifestError, match="are no manifest"):
        manifest.decode_untrusted(bytes(manifest.MAX_SIZE + 1))


def test_random_damage_with_a_right_checksum():
    """Whatever is sealed: a manifest, or a ManifestError."""
    dice = random.Random(5)
    body = manifest.encode(SAMPLE).split(b',\n "sha256"')[0]
    refused = 0
    for _ in range(3000):
        broken = bytearray(body)
        for _ in range(dice.randrange(1, 4)):
            broken[dice.randrange(len(broken))] = dice.choice(b'0123456789{}[]",:-e ')
        digest = hashlib.sha256(broken).hexdigest()
        try:
            manifest.decode_untrusted(
                bytes(broken) + f',\n "sha256": "{digest}"\n}}\n'.encode()
            )
        except ManifestError:
            refused += 1
    assert refused > 1000
