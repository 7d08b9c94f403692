"""What a migration may ask of its host in order to be fast."""

from __future__ import annotations

import logging
import math
import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_LATENCY: Final = "/dev/cpu_dma_latency"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices of the host's operator.

    `awake`: keep processors from sleeping deeply in postcopy, where a fault
    waits for several of them to wake up, one after the other. `congestion`: the
    name of a TCP congestion control for the channels; None is the system's.
    `peer_timeout`: seconds after which a peer that is not to be heard is gone; 0
    is never, or when the kernel notices.
    """

    awake: bool = True
    congestion: str | None = None
    peer_timeout: int = 10

    @property
    def patience(self) -> float:
        """How long to wait for words that a peer has to say at once; seconds."""
        return self.peer_timeout or math.inf


USUAL: Final = Tuning()


@contextmanager
def processors_awake(wanted: bool) -> Iterator[None]:
    """Processors wake up at once meanwhile, if this process may ask for that.

    The request ends with the descriptor, so also with the process. Source: the
    kernel's Documentation/power/pm_qos_interface.rst.
    """
    request = _request() if wanted else None
    try:
        yield
    finally:
        if request is not None:
            os.close(request)


def _request() -> int | None:
    try:
        request = os.open(_LATENCY, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        log.info("processors may sleep deeply: %s: %s", _LATENCY, error.strerror)
        return None
    os.write(request, struct.pack("i", 0))  # microseconds that a wake-up may take
    return request
