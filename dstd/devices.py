"""Device state on its way in: from FULL sections to the guest's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import StreamError
from common.guest.base import Device
from common.stream import constants as c
from common.stream import fields, foreign, section

if TYPE_CHECKING:
    from common.guest.base import Guest
    from common.stream.package import Package
    from common.stream.vmdesc import Ending


class Devices:
    """What the sections besides RAM said.

    `running` is the source's run state: whether the guest is to run here, or
    wherever it is once it was parked.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.early = b""
        """Sections in front of RAM's first part, as they came."""
        self.sections = b""
        """Those behind RAM, as they came; if `opaque`."""
        self.description: bytes | None = None
        self._device: Device | None = None
        self._state = b""
        self.running = True

    @property
    def opaque(self) -> bool:
        """A guest without CPUs takes any device's state, as bytes."""
        return self._guest.device is None and not self._guest.vcpus

    def full_untrusted(self, read: fields.Read) -> None:
        """One FULL section behind its type byte; those we know have a length."""
        header = section.read_header_untrusted(read, c.QEMU_VM_SECTION_FULL)
        assert isinstance(header, section.Full)
        ours = self._guest.device
        if ours and header.name == ours.name:
            self._device_untrusted(read, header, ours)
        elif header.name == c.GLOBALSTATE_SECTION:
            self._run_state_untrusted(read)
        elif header.name == c.TIMER_SECTION:
            section.read_timer_untrusted(read)
        else:
            raise StreamError(
                "device state that this guest cannot load; start both sides with the"
                " same kind of guest",
                got=header.name,
            )
        section.read_footer_untrusted(read, header.section_id)

    def package_untrusted(self, package: Package) -> None:
        """The FULL sections of a package."""
        if self.opaque:
            self._keep(package.sections)
            return
        read = fields.over(package.sections)
        while read.offset < len(package.sections):
            kind = fields.u8_untrusted(read)
            if kind != c.QEMU_VM_SECTION_FULL:
                raise StreamError("unexpected section type in the package", got=kind)
            self.full_untrusted(read)

    def ending_untrusted(self, ending: Ending) -> None:
        """Sections that nobody here can read, and what told their lengths."""
        self._keep(ending.area)
        self.description = ending.text
        for found in ending.sections:
            if found.header.name == c.GLOBALSTATE_SECTION:
                self._run_state_untrusted(fields.over(found.body))

    def _keep(self, sections: bytes) -> None:
        if not sections:
            raise StreamError("the stream has no device state: this is no whole VM")
        self.sections = sections
        state = foreign.run_state_untrusted(sections)
        # QEMU runs a guest whose stream does not say.
        self.running = state in (None, "running")

    def _run_state_untrusted(self, read: fields.Read) -> None:
        state = section.read_globalstate_untrusted(read)
        self.running = state.run_state == "running"

    def _device_untrusted(
        self, read: fields.Read, header: section.Full, ours: Device
    ) -> None:
        if header.version > ours.version:
            raise StreamError(
                f"device state of {ours.name} in a newer version than this guest"
                " loads; update the destination",
                expected=ours.version,
                got=header.version,
            )
        self._device = Device(name=header.name, version=header.version)
        self._state = section.read_device_state_untrusted(read)

    async def load(self) -> None:
        """Give the guest its device state; it may touch RAM that is yet to come."""
        if self._guest.device and not self._device:
            raise StreamError(
                f"the stream has no device state of {self._guest.device.name}; start"
                " both sides with the same kind of guest"
            )
        if self._device:
            await self._guest.load(self._device, self._state)
