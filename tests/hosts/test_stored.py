"""RAM in files, which no process but the daemon knows: systemd keeps the rest.

What has arrived is a file that the service manager stores, FileDescriptorStoreMax=.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hosts.services import ETC, RUN, Move
from support.daemons import POSTCOPY

if TYPE_CHECKING:
    from hosts.bed import Bed

SIZE = 32 << 20
SEED = 1
OWNER = "postcopyd:postcopyd"


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "restarted"])
def test_a_daemon_with_ram_in_files(bed: Bed, name: str, killed: bool) -> None:
    file = f"{RUN}/{name}.ram"
    for host, content in zip(
        bed.hosts, (random.Random(SEED).randbytes(SIZE), bytes(SIZE)), strict=True
    ):
        host.path(file).write_bytes(content)
        host.check("chown", OWNER, file)
        host.write(f"{ETC}/{name}.toml", f'name = "{name}"\nram = ["ram={file}"]\n')
    move = Move(bed, name)
    try:
        for side in reversed(move.sides):
            side.host.systemctl("start", side.socket)
            side.connect()
        move.to_postcopy(*POSTCOPY)
        for side in move.sides:
            if killed:
                side.kill()
                side.host.wait(side.unit, "NRestarts", "1")
            else:
                side.host.systemctl("restart", side.unit)
        move.reconnect()
        for side in move.sides:
            side.wait_query("postcopy-paused")
        assert 0 < move.remaining < SIZE
        move.recover()
        move.src.set_parameters(max_postcopy_bandwidth=0)
        for side in move.sides:
            assert side.wait_query("completed", "failed")["status"] == "completed"
        here, there = (host.path(file).read_bytes() for host in bed.hosts)
        assert here == there
    finally:
        print(move.src.said, move.dst.said, sep="\n")
        move.end()
        for host in bed.hosts:
            host.path(file).unlink()
