"""Run a C loop in a worker thread; stop it by eventfd; result to exception.

trio owns the threads, C owns the loops. A loop is one blocking C function that
returns when its work is done or when its stop descriptor is written. cffi
releases the interpreter lock for the length of the call.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import outcome
import trio

from common.errors import ChannelLost, GuestError, HostError, StreamError
from common.native._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.native import CData


class Stop:
    """An eventfd that ends every loop it was given to, until it is cleared."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Let loops run again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def check(result: CData) -> bool:
    """Raise what the result means; False if the loop was stopped, True if done."""
    if result.kind == lib.RESULT_OK:
        return True
    if result.kind == lib.RESULT_STOPPED:
        return False
    what = ffi.string(result.what).decode()
    reason = f"{what}: {os.strerror(result.err)}" if result.err else what
    if result.kind in (lib.RESULT_CLOSED, lib.RESULT_CHANNEL):
        raise ChannelLost(reason, errno=result.err or None)
    if result.kind == lib.RESULT_STREAM:
        raise StreamError(what, offset=result.offset, got=result.got)
    if result.kind == lib.RESULT_GUEST:
        raise GuestError(f"the guest's process is gone ({reason})")
    raise HostError(reason, errno=result.err or None)


async def run_loop(loop: Callable[[], CData], stop: Stop) -> bool:
    """Run a blocking C loop; on cancellation stop it and wait for it.

    True: its work is done. False: somebody stopped it.
    """
    async with trio.open_nursery() as nursery:
        finished = False

        async def stop_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not finished:
                    stop.set()

        nursery.start_soon(stop_when_cancelled)
        # Captured, so that an error leaves this function as itself and not in
        # the nursery's exception group.
        result = await trio.to_thread.run_sync(outcome.capture, loop)
        finished = True
        nursery.cancel_scope.cancel()
    return check(result.unwrap())
