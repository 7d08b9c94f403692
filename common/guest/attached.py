"""A guest in another process: the socket, its descriptors, requests to it."""

from __future__ import annotations

import array
import fcntl
import logging
import os
import socket
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from common.errors import GuestError, HostError
from common.guest import attach
from common.guest.base import Device, GuestState, RamBlock, file_page_size
from common.guest.keeping import memory_file
from common.native.ram import negotiate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from common.qmp.message import Json

log = logging.getLogger(__name__)

# A VMM answers from a thread that does nothing else; only `load` may have to
# wait for pages that are still to come over the network.
ANSWER_SECONDS: Final = 30.0
LOAD_SECONDS: Final = 300.0
FAREWELL_SECONDS: Final = 1.0
# What a destination has kept for the one after it.
INCOMING: Final = "incoming"
ABILITIES: Final = f"{attach.KEPT}abilities"


class AttachedGuest:
    """A guest whose process speaks the attach protocol.

    `gone` is set when the process went away or broke the protocol; `why` then
    says which. From there on every request raises GuestError.
    """

    outlives_host = False

    def __init__(
        self,
        sock: trio.socket.SocketType,
        hello: attach.Attach,
        descriptors: Mapping[str, int],
    ) -> None:
        self._socket = sock
        self._descriptors = dict(descriptors)
        self._device = hello.device
        self._turn = trio.StrictFIFOLock()
        self._number = 0
        self._answer: tuple[attach.Return | attach.Failure, list[int]] | None = None
        self._answered = trio.Event()  # set while nobody waits for an answer
        self._answered.set()
        self._given_up: set[int] = set()  # requests whose answer nobody wants
        self.has_outlived = False
        """Whether a daemon before us started its process."""
        self.gone = trio.Event()
        self.why = "the guest's process is gone"
        self.machine = hello.machine
        self.pid = hello.pid
        self.vcpus: Sequence[int] = hello.vcpus
        self.state = hello.state
        self.abilities = 0
        self.no_userfaultfd = hello.no_userfaultfd
        self.blocks: Sequence[RamBlock] = tuple(
            RamBlock(
                idstr=block.idstr,
                length=block.length,
                page_size=block.page_size,
                base=block.base,
                guest_address=block.guest_address,
                fd=descriptors[f"block:{block.idstr}"],
            )
            for block in hello.blocks
        )

    @property
    def device(self) -> Device | None:
        return self._device

    @property
    def userfaultfd(self) -> int | None:
        return self._descriptors.get(attach.USERFAULTFD)

    @property
    def pagemap(self) -> int | None:
        return self._descriptors.get(attach.PAGEMAP)

    async def prepare(self) -> None:
        """Have the guest's process keep a note of what was negotiated.

        A userfaultfd cannot be asked later; the note is for the daemon after us.
        """
        if self.userfaultfd is None or ABILITIES in self._descriptors:
            return
        note = os.memfd_create("abilities", os.MFD_CLOEXEC)
        try:
            os.pwrite(note, self.abilities.to_bytes(4, "little"), 0)
            await self.keep("abilities", note)
        finally:
            os.close(note)

    @property
    def kept(self) -> Mapping[str, int]:
        return {
            name.removeprefix(attach.KEPT): fd
            for name, fd in self._descriptors.items()
            if name.startswith(attach.KEPT)
        }

    @property
    def is_gone(self) -> bool:
        return self.gone.is_set()

    async def wait_gone(self) -> NoReturn:
        await self.gone.wait()
        raise GuestError(self.why)

    # -- requests

    async def stop(self) -> None:
        await self._request("stop")
        if self.state is GuestState.RUNNING:
            self.state = GuestState.PAUSED

    async def cont(self) -> None:
        await self._request("cont")
        self.state = GuestState.RUNNING

    async def save(self) -> bytes:
        """The device state; the guest must be stopped."""
        value, fds = await self._request("save", wanted=(attach.STATE,))
        try:
            length = value.get("length")
            if not isinstance(length, int) or not 0 < length <= attach.MAX_DEVICE_STATE:
                raise GuestError(
                    f"device state of length {length!r}; 1 to"
                    f" {attach.MAX_DEVICE_STATE} bytes are allowed",
                    request="save",
                )
            state = os.pread(fds[0], length, 0)
        except OSError as error:
            raise GuestError(
                f"device state cannot be read: {error.strerror}", request="save"
            ) from None
        finally:
            close_all(fds)
        if len(state) != length:
            raise GuestError("device state is shorter than it says", request="save")
        return state

    async def load(self, device: Device, state: bytes) -> None:
        """Give an incoming guest its device state; it is paused afterwards."""
        fd = os.memfd_create("device-state", os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, state, 0)
            await self._request(
                "load",
                {
                    "name": device.name,
                    "version": device.version,
                    "length": len(state),
                },
                send=((attach.STATE, fd),),
                seconds=LOAD_SECONDS,
            )
        finally:
            os.close(fd)
        self.state = GuestState.PAUSED

    def make_kept(self, name: str, length: int) -> int:
        return memory_file(name, length)

    async def keep(self, name: str, fd: int) -> None:
        """Have the guest's process hold a descriptor over our death."""
        await self._request("keep", {"name": name}, send=(("kept", fd),))

    async def forget(self, name: str) -> None:
        with suppress(GuestError):
            await self._request("forget", {"name": name})

    async def quit(self) -> None:
        """End the guest's process; fine if it is gone."""
        with suppress(GuestError):
            await self._request("quit")

    async def _request(
        self,
        name: str,
        arguments: Mapping[str, Json] | None = None,
        *,
        send: Sequence[tuple[str, int]] = (),
        wanted: Sequence[str] = (),
        seconds: float = ANSWER_SECONDS,
    ) -> tuple[Mapping[str, Json], list[int]]:
        """One request and its answer; its descriptors are the caller's to close."""
        async with self._turn:
            if self.gone.is_set():
                raise GuestError(self.why, request=name)
            self._forget_answer()
            self._number += 1
            self._answered = trio.Event()
            packet = attach.request(
                name, self._number, arguments or {}, [label for label, _ in send]
            )
            try:
                with trio.move_on_after(seconds) as scope:
                    await self._send(packet, [fd for _, fd in send])
                    await self._answered.wait()
            finally:
                if not self._answered.is_set():
                    self._given_up.add(self._number)
                    self._answered.set()
            answered, self._answer = self._answer, None
        if scope.cancelled_caught:
            self.lost(f"the guest's process did not answer {name} in {seconds:.0f} s")
            self._hang_up()
        if answered is None:
            raise GuestError(self.why, request=name)
        answer, fds = answered
        if isinstance(answer, attach.Failure):
            close_all(fds)
            raise GuestError(answer.text, request=name)
        if answer.descriptors != tuple(wanted):
            close_all(fds)
            raise GuestError("the answer lacks its descriptor", request=name)
        return answer.value, fds

    def _forget_answer(self) -> None:
        """Of a request that was cancelled in the moment when it was answered."""
        if self._answer:
            close_all(self._answer[1])
            self._answer = None

    async def _send(self, packet: bytes, fds: Sequence[int]) -> None:
        try:
            await _send_packet(self._socket, packet, fds)
        except OSError as error:
            self.lost(f"the guest's process is gone: {error.strerror}")

    # -- what the guest's process says

    async def listen(self) -> None:
        """Take answers and events until the guest's process is gone."""
        try:
            while True:
                packet, fds = await receive_packet(self._socket)
                if not packet:
                    self.lost("the guest's process has closed its connection")
                    return
                try:
                    self._take(attach.decode_untrusted(packet, len(fds)), fds)
                except BaseException:
                    close_all(fds)
                    raise
        except OSError as error:
            self.lost(f"the guest's process is gone: {error.strerror}")
        except attach.AttachError as error:
            await refuse(self._socket, str(error))
            self.lost(f"the guest's process broke the attach protocol: {error}")
            self._hang_up()

    def _take(self, message: attach.FromGuest, fds: list[int]) -> None:
        match message:
            case attach.Return() | attach.Failure() if self._waits_for(message.id):
                self._answer = (message, fds)
                self._answered.set()
            case attach.Return() | attach.Failure() if message.id in self._given_up:
                self._given_up.remove(message.id)
                close_all(fds)
            case attach.Event(name="shutdown"):
                self.lost(f"the guest ended: {message.data.get('reason')}")
                close_all(fds)
            case attach.Event():
                close_all(fds)
            case _:
                raise attach.AttachError("an answer that nobody asked for")

    def _waits_for(self, number: int) -> bool:
        return number == self._number and not self._answered.is_set()

    def _hang_up(self) -> None:
        """Let the guest's process see that this daemon has no use for it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def lost(self, why: str) -> None:
        """The guest is gone, or of no use any more: wake all who wait for it."""
        if not self.gone.is_set():
            log.info("guest lost: %s", why)
            self.why = why
            self.gone.set()
        self._answered.set()

    async def welcome(self) -> None:
        """Tell the guest's process that it has attached; OSError if it is gone."""
        await _send_packet(self._socket, attach.attached(), ())

    async def send_away(self, reason: str) -> None:
        """Tell it that it has not, and forget it."""
        await refuse(self._socket, reason)
        self.close()

    def close(self) -> None:
        """Close the socket and the descriptors; the guest's process has its own."""
        self._socket.close()
        close_all(list(self._descriptors.values()))
        self._descriptors.clear()


# --- attaching --------------------------------------------------------------------


@contextmanager
def listening(path: str) -> Iterator[trio.socket.SocketType]:
    """A socket at which guests attach; a stale one at `path` is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        old = os.umask(0o117)
        try:
            sock.bind(path)
        finally:
            os.umask(old)
        sock.listen()
        yield trio.socket.from_stdlib_socket(sock)
    finally:
        sock.close()
        with suppress(FileNotFoundError):
            os.unlink(path)


async def accept(listener: trio.socket.SocketType, *, incoming: bool) -> AttachedGuest:
    """Wait for a guest that attaches properly; others are told why not.

    `incoming`: it must wait for a migration, else it must not.
    """
    while True:
        guest = await _first(listener, incoming=incoming)
        try:
            await guest.welcome()
        except OSError as error:
            log.warning("a guest went away: %s", error.strerror)
            guest.close()
            continue
        return guest


async def _first(listener: trio.socket.SocketType, *, incoming: bool) -> AttachedGuest:
    """The first guest that introduces itself well; a silent one delays nobody."""
    guests: list[AttachedGuest] = []

    async def introduce(sock: trio.socket.SocketType) -> None:
        try:
            guest = await _introduced(sock, incoming=incoming)
        except (OSError, attach.AttachError) as error:
            log.warning("a guest could not attach: %s", error)
            await refuse(sock, str(error))
            sock.close()
        except trio.Cancelled:
            await refuse(sock, "this daemon takes no guest any more")
            sock.close()
            raise
        else:
            guests.append(guest)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        while True:
            sock, _ = await listener.accept()
            nursery.start_soon(introduce, sock)
    first, *late = guests
    for guest in late:
        await guest.send_away("another guest has attached")
    return first


async def _introduced(sock: trio.socket.SocketType, *, incoming: bool) -> AttachedGuest:
    """The guest behind a connection; AttachError if it is of no use to us."""
    packet, fds = await _first_packet(sock)
    try:
        hello = attach.decode_untrusted(packet, len(fds))
        if not isinstance(hello, attach.Attach):
            raise attach.AttachError("the first message must be attach")
        named = dict(zip(hello.descriptors, fds, strict=True))
        check_state(hello, incoming=incoming)
        check_memory(hello, named)
        guest = AttachedGuest(sock, hello, named)
        guest.abilities = _abilities(named)
    except BaseException:
        close_all(fds)
        raise
    return guest


async def _first_packet(sock: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    with trio.move_on_after(ANSWER_SECONDS):
        packet, fds = await receive_packet(sock)
        if not packet:
            raise attach.AttachError("it closed the connection without a word")
        return packet, fds
    raise attach.AttachError(f"no message came in {ANSWER_SECONDS:.0f} s")


def _abilities(descriptors: Mapping[str, int]) -> int:
    """What the userfaultfd was negotiated for: by a daemon before us, or now."""
    if (userfaultfd := descriptors.get(attach.USERFAULTFD)) is None:
        return 0
    try:
        # On a blocking one the fault loop could not be stopped.
        os.set_blocking(userfaultfd, False)
        if (note := descriptors.get(ABILITIES)) is None:
            return negotiate(userfaultfd)
        return int.from_bytes(os.pread(note, 4, 0), "little")
    except (OSError, HostError) as error:
        raise attach.AttachError(f"its userfaultfd cannot be used: {error}") from None


def check_state(hello: attach.Attach, *, incoming: bool) -> None:
    """A guest that waits belongs to a destination, any other to a source.

    One whose process keeps what a destination has left comes back to one.
    """
    comes_back = f"{attach.KEPT}{INCOMING}" in hello.descriptors
    if incoming and hello.state is not GuestState.INCOMING and not comes_back:
        raise attach.AttachError(
            "this guest runs already; start the VMM waiting for an incoming migration"
        )
    if not incoming and hello.state is GuestState.INCOMING:
        raise attach.AttachError(
            "this guest waits for an incoming migration: it belongs to dstd"
        )


def check_memory(hello: attach.Attach, descriptors: Mapping[str, int]) -> None:
    """Each block's file must be as long as the block, or using it is a SIGBUS."""
    for block in hello.blocks:
        fd = descriptors[f"block:{block.idstr}"]
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise attach.AttachError(f"block {block.idstr!r} is not a file")
        if status.st_size < block.length:
            raise attach.AttachError(
                f"the file of block {block.idstr!r} has {status.st_size} bytes,"
                f" the block {block.length}"
            )
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise attach.AttachError(f"block {block.idstr!r} cannot be written to")
        if (page_size := file_page_size(fd)) != block.page_size:
            raise attach.AttachError(
                f"block {block.idstr!r} has page-size {block.page_size}, its file"
                f" {page_size}"
            )


async def refuse(sock: trio.socket.SocketType, reason: str) -> None:
    """Say why, if anybody still listens; the packet fits an empty socket."""
    with trio.CancelScope(shield=True), suppress(OSError):
        with trio.move_on_after(FAREWELL_SECONDS):
            await _send_packet(sock, attach.refused(reason), ())


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _send_packet(
    sock: trio.socket.SocketType, packet: bytes, fds: Sequence[int]
) -> None:
    rights = array.array("i", fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
    await sock.sendmsg([packet], ancillary)


async def receive_packet(sock: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, which are the caller's to close."""
    size = socket.CMSG_SPACE(attach.MAX_DESCRIPTORS * 4)
    packet, ancillary, flags, _ = await sock.recvmsg(
        attach.MAX_PACKET, size, socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds.tolist())
        raise attach.AttachError(
            f"a message of more than {attach.MAX_PACKET} bytes"
            f" or {attach.MAX_DESCRIPTORS} descriptors"
        )
    return packet, fds.tolist()
