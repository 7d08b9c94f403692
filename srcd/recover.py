"""`srcd recover`: both halves of a recovery, in order and as often as wanted.

It looks at both ends, lets the one that still waits for a dead connection know,
has the destination listen and the source connect, and waits until the guest's
pages come again. Run once more, it begins with what it finds. It uses nothing
but QEMU's commands, so either end may be a QEMU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from common import address
from common.qmp.client import CommandFailed
from common.status import MigrationStatus as M
from srcd.ends import End, Place, Seen, Unreachable, reachable, uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.address import Address

# Between two looks: neither end need have the capability `events` on.
LOOK_SECONDS: Final = 0.1
# So long two ends may differ before one is stuck; and so long a QEMU before 9.1
# shows nothing of an order to resume.
STUCK_SECONDS: Final = 2.0

PRECOPY: Final = frozenset({M.SETUP, M.ACTIVE, M.PRE_SWITCHOVER, M.DEVICE})
GOES_ON: Final = frozenset({M.POSTCOPY_ACTIVE, M.COMPLETED})
PAUSABLE: Final = frozenset({M.POSTCOPY_ACTIVE, M.POSTCOPY_RECOVER})

NOWHERE: Final = "destination: it listens nowhere; say with --uri where it shall"


class Exit(IntEnum):
    """The exit status."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PAUSED = 3  # it can be tried again
    CANCELLED = 4


class Verdict(Exception):
    """The end of it, with the sentence to say."""

    def __init__(self, code: Exit, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverOrder:
    """`target` is where the destination shall listen; None: where it did."""

    source: Place
    destination: Place
    target: Address | None
    timeout: float


def recover(order: RecoverOrder, say: Callable[[str], None] = print) -> Exit:
    """Do it, telling each step; what it came to."""
    try:
        with End("source", order.source, order.timeout) as source:
            _judge_source(source.look())
            verdict = _with_both(order, source, say)
    except Verdict as found:
        verdict = found
    except Unreachable as error:
        verdict = Verdict(Exit.FAILED, str(error))
    except KeyboardInterrupt:
        verdict = Verdict(Exit.PAUSED, "interrupted; it can be run again")
    say(str(verdict))
    return verdict.code


def _with_both(order: RecoverOrder, source: End, say: Callable[[str], None]) -> Verdict:
    try:
        with End("destination", order.destination, order.timeout) as destination:
            return _Recovery(order, source, destination, say).run()
    except Unreachable as error:
        status = source.look().status
        code = Exit.PAUSED if status == M.POSTCOPY_PAUSED else Exit.FAILED
        return Verdict(code, f"{error}; the source is {status}")


def _judge_source(seen: Seen) -> None:
    """What is decided at the source alone."""
    if seen.status == M.COMPLETED:
        raise Verdict(Exit.DONE, "the migration is completed")
    if seen.status in (M.CANCELLED, M.CANCELLING):
        raise Verdict(Exit.CANCELLED, "source: cancelled; the guest is here")
    if seen.status == M.FAILED:
        raise Verdict(Exit.FAILED, f"source: {seen}; this cannot be recovered")
    if seen.status == M.NONE:
        raise Verdict(Exit.FAILED, "source: no migration was begun here")
    if seen.status in PRECOPY:
        raise Verdict(Exit.FAILED, f"source: {seen}; this is no postcopy yet")


def _judge_destination(seen: Seen) -> None:
    if seen.status == M.FAILED:
        raise Verdict(Exit.FAILED, f"destination: {seen}; this cannot be recovered")
    if seen.status in (M.NONE, M.SETUP):
        raise Verdict(
            Exit.FAILED,
            f"destination: {seen}; it knows nothing of this migration",
        )


class _Recovery:
    def __init__(
        self,
        order: RecoverOrder,
        source: End,
        destination: End,
        say: Callable[[str], None],
    ) -> None:
        self._order = order
        self._source = source
        self._destination = destination
        self._say = say
        self._deadline = time.monotonic() + order.timeout
        self._shown: dict[str, Seen] = {}
        self._since = time.monotonic()

    def run(self) -> Verdict:
        """To the end, or a Verdict before it."""
        while True:
            src, dst = self._look()
            if src.status in GOES_ON and dst.status in GOES_ON:
                return Verdict(Exit.DONE, "postcopy goes on")
            if src.status == M.POSTCOPY_PAUSED and self._waits(dst):
                self._resume(src, dst)
            elif not self._pause_stuck(src, dst):
                self._wait(src, dst)

    @staticmethod
    def _waits(dst: Seen) -> bool:
        """One that has all pages waits for a source that does not know it."""
        return dst.status in (M.POSTCOPY_PAUSED, M.COMPLETED)

    def _look(self) -> tuple[Seen, Seen]:
        both = []
        for end in (self._source, self._destination):
            seen = end.look()
            if self._shown.get(end.role) != seen:
                self._say(f"{end.role}: {seen}")
                self._shown[end.role] = seen
                self._since = time.monotonic()
            both.append(seen)
        src, dst = both
        _judge_source(src)
        _judge_destination(dst)
        return src, dst

    def _wait(self, src: Seen, dst: Seen) -> None:
        if time.monotonic() > self._deadline:
            raise Verdict(
                Exit.PAUSED,
                f"not within {self._order.timeout:g} s: the source is {src.status},"
                f" the destination {dst.status}",
            )
        time.sleep(LOOK_SECONDS)

    # -- one paused and the other not

    def _pause_stuck(self, src: Seen, dst: Seen) -> bool:
        """The end that goes on alone, and has done so for a while."""
        pairs = ((self._source, src, dst), (self._destination, dst, src))
        for end, seen, other in pairs:
            stuck = seen.status in PAUSABLE and other.status == M.POSTCOPY_PAUSED
            if stuck and time.monotonic() - self._since > STUCK_SECONDS:
                self._order_of(end, "migrate-pause", end.pause)
                return True
        return False

    def _order_of(self, end: End, shown: str, order: Callable[[], None]) -> str:
        """Why it was refused; it may have come too late, which a look will show."""
        self._say(f"{end.role}: {shown}")
        try:
            order()
        except CommandFailed as error:
            self._say(f"{end.role}: refused: {error}")
            return str(error)
        return ""

    # -- both paused

    def _resume(self, src: Seen, dst: Seen) -> None:
        if dst.status == M.POSTCOPY_PAUSED and not self._listen(dst):
            return
        target = self._destination.look().listening or self._order.target
        if target is None:
            raise Verdict(Exit.PAUSED, NOWHERE)
        host = self._destination.host
        there = uri(reachable(target, self._order.target, host))
        if why := self._order_of(
            self._source, f"migrate {there} resume", lambda: self._source.resume(there)
        ):
            self._try_again_if_changed(why)
        else:
            self._follow(src)

    def _listen(self, dst: Seen) -> bool:
        """Whether the destination waits for the source; else look at both anew."""
        wanted = self._order.target or dst.listening
        if wanted is None:
            raise Verdict(Exit.PAUSED, NOWHERE)
        why = self._order_to_listen(wanted)
        if why and self._destination.look().listening is None:
            # A QEMU may stand in its own way at the same address: it closes its
            # listener a moment late, and has none then.
            time.sleep(LOOK_SECONDS)
            why = self._order_to_listen(wanted)
        if why and self._order.target:
            self._try_again_if_changed(why)
            return False
        return True  # or else it still listens where it did

    def _order_to_listen(self, wanted: Address) -> str:
        return self._order_of(
            self._destination,
            f"migrate-recover {uri(wanted)}",
            lambda: self._destination.recover(uri(wanted)),
        )

    def _try_again_if_changed(self, why: str) -> None:
        """An order is refused to an end that has gone on by itself meanwhile."""
        src, dst = self._look()
        if src.status == M.POSTCOPY_PAUSED and self._waits(dst):
            raise Verdict(Exit.PAUSED, f"{why}; both are paused, try again")

    def _follow(self, before: Seen) -> None:
        """Until the attempt has succeeded; a Verdict if it has not."""
        ordered, begun = time.monotonic(), False
        while True:
            src, dst = self._look()
            if src.status in GOES_ON and dst.status in GOES_ON:
                return
            begun = begun or src.status != M.POSTCOPY_PAUSED
            late = time.monotonic() - ordered > STUCK_SECONDS
            if src.status == M.POSTCOPY_PAUSED and (
                begun or late or src.error != before.error
            ):
                raise Verdict(Exit.PAUSED, f"paused again: {src.error}")
            self._wait(src, dst)


def parse_target(text: str) -> Address:
    """Where a destination can listen for a recovery; AddressError."""
    found = address.parse(text)
    if not address.takes_many(found):
        raise address.AddressError(f"nobody can connect to {text} for a recovery")
    return found
