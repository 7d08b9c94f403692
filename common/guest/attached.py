"""A guest in another process: the socket, its descriptors, requests to it."""

from __future__ import annotations

import array
import logging
import os
import socket
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from common.errors import GuestError
from common.guest import attach
from common.guest.base import Device, GuestState, RamBlock
from common.native.ram import negotiate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from common.qmp.message import Json

log = logging.getLogger(__name__)

# A VMM answers from a thread that does nothing else; only `load` may have to
# wait for pages that are still to come over the network.
MAX_SAVED: Final = 48 << 20  # fits the stream's package with room for the rest
ANSWER_SECONDS: Final = 30.0
LOAD_SECONDS: Final = 300.0
ABILITIES: Final = "keep:abilities"


class AttachedGuest:
    """A guest whose process speaks the attach protocol.

    `gone` is set when the process went away or broke the protocol; `why` then
    says which. From there on every request raises GuestError.
    """

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
        self._answered = trio.Event()
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
        """Negotiate the userfaultfd, once in its life.

        A userfaultfd cannot be asked later what was negotiated, so the guest's
        process keeps a note of it for the daemon after us.
        """
        if self.userfaultfd is None:
            return
        if (note := self._descriptors.get(ABILITIES)) is not None:
            self.abilities = int.from_bytes(os.pread(note, 4, 0), "little")
            return
        self.abilities = negotiate(self.userfaultfd)
        note = os.memfd_create("abilities", os.MFD_CLOEXEC)
        try:
            os.pwrite(note, self.abilities.to_bytes(4, "little"), 0)
            await self.keep("abilities", note)
        finally:
            os.close(note)

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
            if not isinstance(length, int) or not 0 < length <= MAX_SAVED:
                raise GuestError(f"device state of length {length!r}", request="save")
            state = os.pread(fds[0], length, 0)
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

    async def keep(self, name: str, fd: int) -> None:
        """Have the guest's process hold a descriptor over our death."""
        await self._request("keep", {"name": name}, send=(("kept", fd),))

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
            self._number += 1
            self._answered = trio.Event()
            packet = attach.request(
                name, self._number, arguments or {}, [label for label, _ in send]
            )
            with trio.move_on_after(seconds) as scope:
                await self._send(packet, [fd for _, fd in send])
                await self._answered.wait()
        if scope.cancelled_caught:
            self.lost(f"the guest's process did not answer {name} in {seconds:.0f} s")
        if self._answer is None:
            raise GuestError(self.why, request=name)
        answer, fds = self._answer
        self._answer = None
        if isinstance(answer, attach.Failure):
            raise GuestError(answer.text, request=name)
        if answer.descriptors != tuple(wanted):
            close_all(fds)
            raise GuestError("the answer lacks its descriptor", request=name)
        return answer.value, fds

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
                self._take(attach.decode_untrusted(packet, len(fds)), fds)
        except (OSError, attach.AttachError) as error:
            self.lost(f"the guest's process broke the attach protocol: {error}")

    def _take(self, message: attach.FromGuest, fds: list[int]) -> None:
        match message:
            case attach.Return() | attach.Failure() if message.id == self._number:
                self._answer = (message, fds)
                self._answered.set()
            case attach.Event(name="shutdown"):
                self.lost(f"the guest ended: {message.data.get('reason')}")
            case attach.Event():
                close_all(fds)
            case _:
                close_all(fds)
                raise attach.AttachError("an answer that nobody asked for")

    def lost(self, why: str) -> None:
        """The guest is gone, or of no use any more: wake all who wait for it."""
        if not self.gone.is_set():
            log.info("guest lost: %s", why)
            self.why = why
            self.gone.set()
        self._answered.set()

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


async def accept(listener: trio.socket.SocketType) -> AttachedGuest:
    """Wait for a guest that attaches properly; others are told why not."""
    while True:
        sock, _ = await listener.accept()
        try:
            return await _welcome(sock)
        except (OSError, attach.AttachError, trio.TooSlowError) as error:
            log.warning("a guest could not attach: %s", error)
            with suppress(OSError):
                await _send_packet(sock, attach.refused(str(error)), ())
            sock.close()


async def _welcome(sock: trio.socket.SocketType) -> AttachedGuest:
    fds: list[int] = []
    try:
        with trio.fail_after(ANSWER_SECONDS):
            packet, fds = await receive_packet(sock)
        hello = attach.decode_untrusted(packet, len(fds))
        if not isinstance(hello, attach.Attach):
            raise attach.AttachError("the first message must be attach")
        named = dict(zip(hello.descriptors, fds, strict=True))
        check_memory(hello, named)
        await _send_packet(sock, attach.attached(), ())
        return AttachedGuest(sock, hello, named)
    except BaseException:
        close_all(fds)
        raise


def check_memory(hello: attach.Attach, descriptors: Mapping[str, int]) -> None:
    """Each block's file must be as long as the block, or using it is a SIGBUS."""
    for block in hello.blocks:
        status = os.fstat(descriptors[f"block:{block.idstr}"])
        if not stat.S_ISREG(status.st_mode):
            raise attach.AttachError(f"block {block.idstr!r} is not a file")
        if status.st_size < block.length:
            raise attach.AttachError(
                f"the file of block {block.idstr!r} has {status.st_size} bytes,"
                f" the block {block.length}"
            )


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
