"""Files of QEMU and of libvirt: a guest that was saved in one goes on."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from support import saved
from support.parking import Workshop

if TYPE_CHECKING:
    from pathlib import Path

    from support.linux_guest import LinuxGuest

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]


def srcd(*words: str | Path) -> str:
    """What a verb of srcd prints; it has to succeed."""
    ran = subprocess.run(
        ["srcd", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def save_running(guest: LinuxGuest, path: Path) -> None:
    saved.save(guest, path, mapped=True)


# How the file is written, how the guest is served, and what import says.
WAYS = [
    ("10", "pc", saved.save, "lazy", "a stream, its RAM copied"),
    ("10", "q35", save_running, "lazy", "mapped-ram, its RAM used in place"),
    ("10", "pc", save_running, "full", "mapped-ram, its RAM used in place"),
    ("10", "pc", saved.virsh_save, "preempt", "virsh save image's XML"),
    ("7.2", "pc", saved.save, "preempt", "a stream, its RAM copied"),
    ("7.2", "q35", saved.virsh_save, "lazy", "virsh save image's XML"),
]


@pytest.mark.parametrize(("version", "machine", "save", "out", "words"), WAYS)
def test_guest_goes_on(
    private_dir: Path, version: str, machine: str, save, out: str, words: str
) -> None:
    file = private_dir / "saved"
    with Workshop(private_dir, version=version, machine=machine) as shop:
        guest = shop.boot()
        save(guest, file)
        before = guest.console()
        guest.process.kill()
        assert words in srcd("import", file, shop.parked)
        assert "pc.ram" in srcd("inspect", shop.parked)
        assert "OK" in srcd("verify", shop.parked)
        shop.serve(out).wait_continued(before)


def test_a_virsh_image_that_has_its_pages_in_place(private_dir: Path) -> None:
    """libvirt's format "sparse": mapped-ram behind the XML."""
    file = private_dir / "saved"
    with Workshop(private_dir) as shop:
        guest = shop.boot()
        saved.virsh_save(guest, file, mapped=True)
        before = guest.console()
        guest.process.kill()
        assert "used in place" in srcd("import", file, shop.parked)
        assert "libvirt-xml: 3 lines" in srcd("inspect", shop.parked)
        shop.serve("lazy").wait_continued(before)


def test_a_virsh_image_by_precopy(private_dir: Path) -> None:
    """Its device state says that it is paused: so it waits for the operator."""
    file = private_dir / "saved"
    with Workshop(private_dir, disk=False) as shop:
        guest = shop.boot()
        saved.virsh_save(guest, file)
        before = guest.console()
        guest.process.kill()
        srcd("import", file, shop.parked)
        again = shop.serve("full")
        assert again.execute("query-status")["status"] == "paused"
        again.execute("cont")
        again.wait_continued(before)


def test_one_file_for_qemu_and_for_us(private_dir: Path) -> None:
    """What was imported in place can still be loaded by QEMU itself."""
    file = private_dir / "saved"
    with Workshop(private_dir, disk=False) as shop:
        guest = shop.boot()
        saved.save(guest, file, mapped=True)
        before = guest.console()
        guest.process.kill()
        srcd("import", file, shop.parked)
        again = shop.waiting("mapped-ram")
        again.execute("migrate-incoming", uri=f"file:{file}")
        again.wait_continued(before)
        assert "OK" in srcd("verify", shop.parked)
