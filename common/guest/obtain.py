"""Get the guest that a daemon was configured with, whichever kind it is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from common.config import DEFAULT_MACHINE, PARKED_MACHINE
from common.guest.attached import accept, listening
from common.guest.base import GuestState
from common.guest.microvm import MicroVm, start
from common.guest.parked import ParkedGuest
from common.guest.parking import ParkingGuest
from common.guest.stored import StoredGuest

if TYPE_CHECKING:
    import trio

    from common.config import GuestConfig
    from common.guest.base import Guest

log = logging.getLogger(__name__)


async def obtain(
    config: GuestConfig, nursery: trio.Nursery, *, incoming: bool, control: str
) -> Guest:
    """The guest, attached and ready; its process is listened to in `nursery`.

    `control` is the daemon's first control socket: the built-in guest attaches
    beside it.
    """
    if config.park:
        return ParkingGuest(config.park)
    if config.parked:
        return StoredGuest(
            config.parked,
            clone=config.clone,
            lazy=config.lazy,
            learns=config.working_set,
            learn_seconds=config.learn,
            beside=control,
        )
    if config.ram:
        state = GuestState.INCOMING if incoming else GuestState.RUNNING
        return ParkedGuest(config.machine or PARKED_MACHINE, config.ram, state)
    if config.socket:
        with listening(config.socket) as listener:
            log.info("waiting for a guest at %s", config.socket)
            guest = await accept(listener, incoming=incoming)
    else:
        vm = _microvm(config, incoming=incoming)
        guest = await start(vm, f"{control}.guest", nursery)
    nursery.start_soon(guest.listen)
    await guest.prepare()
    if config.machine:
        guest.machine = config.machine
    return guest


def _microvm(config: GuestConfig, *, incoming: bool) -> MicroVm:
    assert config.memory is not None
    return MicroVm(
        memory=config.memory,
        vcpus=config.vcpus,
        accel=config.accel,
        machine=config.machine or DEFAULT_MACHINE,
        hugepages=config.hugepages,
        kernel=None if incoming else config.kernel,
        append=config.append,
        serial=config.serial,
        paused=config.paused,
    )
