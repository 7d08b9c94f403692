"""The built-in guest program speaks the attach protocol, with KVM and without."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from pathlib import Path

import pytest
from support.accels import both_accels
from support.fake_daemon import FakeDaemon, RequestFailed
from support.microvm import Bench
from support.ram import HUGE_PAGE, MIB, PAGE

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

pytestmark = pytest.mark.userfaultfd


# --- attaching ---------------------------------------------------------------


@both_accels
def test_attach_message(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, "--vcpus", "2", "--machine", "m-7")
    message = vmm.message
    assert message["version"] == 1
    assert message["machine"] == "m-7"
    assert message["device"]["version"] == 1
    assert message["state"] == "running"
    assert message["pid"] == vm.process.pid
    threads = {
        int(path.name) for path in Path(f"/proc/{vm.process.pid}/task").iterdir()
    }
    assert len(message["vcpus"]) == 2
    assert set(message["vcpus"]) < threads
    [block] = message["blocks"]
    assert block["idstr"] == "ram"
    assert block["length"] == 32 * MIB
    assert block["page-size"] == PAGE
    assert block["base"] % HUGE_PAGE == 0
    assert list(vmm.descriptors) == ["userfaultfd", "pagemap", "block:ram"]


def test_attached_ram_cannot_shrink_and_is_not_inherited(bench: Bench) -> None:
    vm, vmm = bench.boot("--accel", "process")
    memfd = vmm.descriptors["block:ram"]
    assert stat.S_ISREG(os.fstat(memfd).st_mode)
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & SEALS == SEALS
    base = format(vmm.message["blocks"][0]["base"], "x")
    smaps = Path(f"/proc/{vm.process.pid}/smaps").read_text()
    of_ram = re.search(rf"^{base}-.*?^VmFlags: ([^\n]*)", smaps, re.S | re.M)
    assert of_ram is not None
    assert {"dc", "dd"} <= set(of_ram[1].split()), "DONTFORK and DONTDUMP"


@both_accels
def test_incoming_ram_is_untouched(bench: Bench, accel: str) -> None:
    _, vmm = bench.start("--incoming", "--accel", accel)
    assert vmm.message["state"] == "incoming"
    assert os.fstat(vmm.descriptors["block:ram"]).st_blocks == 0


def test_waits_for_a_daemon_that_starts_later(private_dir: Path) -> None:
    bench = Bench(private_dir / "guest")
    bench.daemon.close()
    (private_dir / "guest").unlink()
    vm = bench.run("--incoming", "--accel", "process", memory=8 * MIB)
    # It has set everything up, so the next thing it does is to connect.
    vm.until(lambda: len(list(Path(f"/proc/{vm.process.pid}/task").iterdir())) == 2)
    bench.daemon = FakeDaemon(private_dir / "guest")
    bench.accept()
    bench.close()


def test_refused_at_first_ends_with_the_reason(bench: Bench) -> None:
    vm = bench.run("--incoming", "--accel", "process", memory=8 * MIB)
    bench.daemon.accept(refuse="the moon is in the wrong phase").close()
    status, errors = vm.wait_end()
    assert status == 1
    assert "the daemon refuses the guest: the moon is in the wrong phase" in errors


def test_attach_paused(bench: Bench) -> None:
    vm, vmm = bench.boot("--paused", "--accel", "process")
    assert vmm.message["state"] == "paused"
    assert vmm.report().counter == 0
    vmm.request("cont")
    vm.wait_line("filled")


# --- requests ----------------------------------------------------------------


@both_accels
def test_stop_and_cont_may_repeat(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel, "--vcpus", "2")
    vm.wait_line("filled")
    for _ in range(20):
        vmm.request("stop")
        counter = vmm.report().counter
        vmm.request("stop")
        vmm.save()
        assert vmm.report().counter == counter
        vmm.request("cont")
        vmm.request("cont")
        vm.until(lambda n=counter: vmm.report().counter > n)
    assert vmm.report().wrong == 0


def test_unknown_request_is_answered(bench: Bench) -> None:
    _, vmm = bench.start("--incoming", "--accel", "process")
    with pytest.raises(RequestFailed, match="unknown request 'dance'"):
        vmm.request("dance")
    with pytest.raises(RequestFailed, match="waits for its state"):
        vmm.request("cont")


def test_save_of_a_running_guest_fails(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    with pytest.raises(RequestFailed, match="the guest is running, not paused"):
        vmm.save()
    with pytest.raises(RequestFailed, match="the guest is running, not incoming"):
        vmm.load(b"x")


def test_quit(bench: Bench) -> None:
    vm, vmm = bench.boot("--accel", "process")
    vmm.request("quit")
    assert vm.wait_end() == (0, "")


def test_malformed_request_ends_the_connection(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    vmm.send({"request": "stop", "id": -1})
    with pytest.raises(EOFError):
        vmm.receive()
    assert bench.accept().message["state"] == "running"


@both_accels
def test_load_refuses_bad_state(bench: Bench, accel: str) -> None:
    _, source = bench.boot("--accel", accel)
    source.request("stop")
    state = source.save()
    _, destination = bench.start("--incoming", "--accel", accel)
    bad: list[tuple[bytes, dict[str, object], str]] = [
        (state, {"name": "qemu"}, "not of 'qemu'"),
        (state, {"version": 2}, "version 2 is newer"),
        (state, {"length": len(state) + 1}, f"no {len(state) + 1} bytes"),
        (state, {"length": 1 << 40}, "expected 1 to"),
        (state[:-1], {}, "ends inside of record"),
        (state + b"x", {}, "1 bytes follow"),
        (b"QEVM" + state[4:], {}, "no device state of microvm"),
    ]
    for data, changes, reason in bad:
        with pytest.raises(RequestFailed, match=re.escape(reason)):
            destination.load(data, **changes)
    destination.load(state)


def test_load_refuses_another_number_of_vcpus(bench: Bench) -> None:
    _, source = bench.boot("--accel", "process", "--vcpus", "2")
    source.request("stop")
    state = source.save()
    _, destination = bench.start("--incoming", "--accel", "process")
    with pytest.raises(RequestFailed, match="of 2 vCPUs, this guest has 1"):
        destination.load(state)


# --- when the daemon goes away -----------------------------------------------


@both_accels
def test_daemon_goes_away_and_another_comes(bench: Bench, accel: str) -> None:
    vm, vmm = bench.boot("--accel", accel)
    vm.wait_line("filled")
    base = vmm.message["blocks"][0]["base"]
    for name in ("received", "second", "second", "third"):
        fd = os.memfd_create(name)
        os.write(fd, name.encode())
        vmm.request("keep", {"kept": fd}, name=name)
        os.close(fd)
    vmm.request("forget", name="third")
    with pytest.raises(RequestFailed, match="nothing is kept under the name 'third'"):
        vmm.request("forget", name="third")
    counter = vmm.report().counter
    vmm.close()
    bench.attached.remove(vmm)

    again = bench.accept()
    assert again.message["state"] == "running"
    assert again.message["blocks"][0]["base"] == base
    kept = {name for name in again.descriptors if name.startswith("keep:")}
    assert kept == {"keep:received", "keep:second"}
    assert os.pread(again.descriptors["keep:received"], 99, 0) == b"received"
    vm.until(lambda: again.report().counter > counter)
    assert again.report().wrong == 0


def test_daemon_goes_away_from_a_paused_and_an_incoming_guest(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    vmm.request("stop")
    state = vmm.save()
    ram = vmm.ram[:]
    vmm.close()
    bench.attached.remove(vmm)
    assert bench.accept().message["state"] == "paused"

    _, vmm = bench.start("--incoming", "--accel", "process")
    vmm.close()
    bench.attached.remove(vmm)
    again = bench.accept()
    assert again.message["state"] == "incoming"
    again.ram[:] = ram
    again.load(state)
    again.request("cont")


def test_refused_again_is_tried_again(bench: Bench) -> None:
    _, vmm = bench.boot("--accel", "process")
    vmm.close()
    bench.attached.remove(vmm)
    for _ in range(3):
        bench.daemon.accept(refuse="not yet").close()
    assert bench.accept().message["state"] == "running"
