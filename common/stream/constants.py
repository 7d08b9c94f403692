"""Every number of the wire, under the name it has in QEMU's sources.

The second part are values of our own, which only srcd and dstd exchange, and
the third the limits that we put on what a peer may make us read.
"""

from __future__ import annotations

from typing import Final

# The file header: two be32.
QEMU_VM_FILE_MAGIC: Final = 0x5145564D  # "QEVM"
QEMU_VM_FILE_VERSION: Final = 3

# Section types: one byte each.
QEMU_VM_EOF: Final = 0x00
QEMU_VM_SECTION_START: Final = 0x01
QEMU_VM_SECTION_PART: Final = 0x02
QEMU_VM_SECTION_END: Final = 0x03
QEMU_VM_SECTION_FULL: Final = 0x04
QEMU_VM_SUBSECTION: Final = 0x05
QEMU_VM_VMDESCRIPTION: Final = 0x06
QEMU_VM_CONFIGURATION: Final = 0x07
QEMU_VM_COMMAND: Final = 0x08
QEMU_VM_SECTION_FOOTER: Final = 0x7E

# Subsections of the configuration section; all have version 1.
CONFIGURATION_PAGE_BITS: Final = "configuration/target-page-bits"
CONFIGURATION_CAPABILITIES: Final = "configuration/capabilities"
CONFIGURATION_UUID: Final = "configuration/uuid"
CONFIGURATION_SUBSECTION_VERSION: Final = 1

# The only capabilities that a configuration section lists, and QEMU compares.
VALIDATED_CAPABILITIES: Final = ("x-ignore-shared", "mapped-ram")

# Commands: be16.
MIG_CMD_OPEN_RETURN_PATH: Final = 1
MIG_CMD_PING: Final = 2
MIG_CMD_POSTCOPY_ADVISE: Final = 3
MIG_CMD_POSTCOPY_LISTEN: Final = 4
MIG_CMD_POSTCOPY_RUN: Final = 5
MIG_CMD_POSTCOPY_RAM_DISCARD: Final = 6
MIG_CMD_PACKAGED: Final = 7
MIG_CMD_ENABLE_COLO: Final = 8
MIG_CMD_POSTCOPY_RESUME: Final = 9
MIG_CMD_RECV_BITMAP: Final = 10
MIG_CMD_SWITCHOVER_START: Final = 11

POSTCOPY_RAM_DISCARD_VERSION: Final = 0
MAX_DISCARDS_PER_COMMAND: Final = 12  # what QEMU sends in one

# PING values. QEMU has no names for 1 to 4; it only traces them.
PING_FIRST: Final = 1  # behind OPEN_RETURN_PATH
PING_DISCARDED: Final = 2  # behind the discards, before PACKAGED
PING_LOADED: Final = 3  # in the package, behind the device sections
PING_LISTENING: Final = 4  # behind the package
QEMU_VM_PING_PACKAGED_LOADED: Final = 0x42  # in the package, QEMU 10.2

# Return path messages: be16.
MIG_RP_MSG_SHUT: Final = 1
MIG_RP_MSG_PONG: Final = 2
MIG_RP_MSG_REQ_PAGES_ID: Final = 3
MIG_RP_MSG_REQ_PAGES: Final = 4
MIG_RP_MSG_RECV_BITMAP: Final = 5
MIG_RP_MSG_RESUME_ACK: Final = 6
MIG_RP_MSG_SWITCHOVER_ACK: Final = 7

MIGRATION_RESUME_ACK_VALUE: Final = 1
RAMBLOCK_RECV_BITMAP_ENDING: Final = 0x0123456789ABCDEF

# RAM record flags, in the bits below the page size.
RAM_SAVE_FLAG_ZERO: Final = 0x002
RAM_SAVE_FLAG_MEM_SIZE: Final = 0x004
RAM_SAVE_FLAG_PAGE: Final = 0x008
RAM_SAVE_FLAG_EOS: Final = 0x010
RAM_SAVE_FLAG_CONTINUE: Final = 0x020
RAM_SAVE_FLAG_XBZRLE: Final = 0x040
RAM_SAVE_FLAG_HOOK: Final = 0x080
RAM_SAVE_FLAG_COMPRESS_PAGE: Final = 0x100
RAM_SAVE_FLAG_MULTIFD_FLUSH: Final = 0x200

TARGET_PAGE_BITS: Final = 12
TARGET_PAGE_SIZE: Final = 1 << TARGET_PAGE_BITS

MULTIFD_MAGIC: Final = 0x11223344  # first bytes of a channel we do not take

# Sections that we send. A QEMU destination mistakes RAM with id 0 for its timer.
RAM_SECTION: Final = "ram"
RAM_SECTION_ID: Final = 1
# Of a parked VM: its device state has the ids of the QEMU it came from, which
# counts them up from 0, and RAM there need not have been 1.
PARKED_RAM_SECTION_ID: Final = 0x50430001
RAM_SECTION_VERSION: Final = 4
TIMER_SECTION: Final = "timer"
TIMER_SECTION_VERSION: Final = 2
GLOBALSTATE_SECTION: Final = "globalstate"
GLOBALSTATE_SECTION_ID: Final = 3
GLOBALSTATE_SECTION_VERSION: Final = 1
DEVICE_SECTION_ID: Final = 4  # name and version are the guest's

# --- Ours: docs/wire-format.md, "What srcd and dstd agree on" ---------------

PING_HELLO: Final = 0x50430001  # "PC" 1: this source is srcd
PING_SETUP: Final = 0x50430002  # behind START: its PONG accepts what came so far
PING_COMMIT: Final = 0x50430003  # the source gives the guest up for good
PING_PREEMPT: Final = 0x50430004  # behind ADVISE: a preempt channel will come
PING_PREPARED: Final = 0x50430005  # behind LAYOUT: PONG when memory is ready
PING_COMPLETED: Final = 0x50430006  # behind SHUT 0: the source has noted it
PING_MIGRATION: Final = 0x51000000  # and a number: which migration this is
PONG_HELLO_ACK: Final = 0x50430000  # this destination is dstd
PING_MARKS: Final = 0x50460000  # "PF" and a number: flow control, see csrc/flow.h
MIG_CMD_X_LAYOUT: Final = 0x5043  # what a RAM block looks like; never to QEMU
LAYOUT_VERSION: Final = 0
LAYOUT_CHUNK: Final = 2 << 20  # bytes of RAM that one byte of a layout tells about
RP_X_FAILURE: Final = 0x8001  # one sentence, before SHUT 1; never to QEMU
MIGRATIONS: Final = 1 << 24  # numbers of migrations are below

# --- Limits on what a peer may make us read ---------------------------------

MAX_NAME: Final = 255  # what one length byte can say
MAX_LAYOUT: Final = 32768  # chunks in one LAYOUT: 64 GiB
MAX_MACHINE_NAME: Final = 256
MAX_CAPABILITIES: Final = 64
MAX_BLOCKS: Final = 4096
MAX_RAM_BYTES: Final = 1 << 52  # what an x86 physical address can name
MAX_PACKAGE: Final = 64 << 20
MAX_PINGS: Final = 64  # in a package; QEMU sends two at most
MAX_DEVICE_STATE: Final = 1 << 30
MAX_VMDESC: Final = 16 << 20
MAX_RP_PAYLOAD: Final = 512  # QEMU's own limit
MAX_FAILURE_TEXT: Final = 500
