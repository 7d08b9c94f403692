/*
 * Numbers shared by entry.S and the guest's C code.
 *
 * The window shows the guest's RAM without the hole below 4 GiB: byte n of the
 * RAM block is at GUEST_WINDOW + n, as it is in a VMM's mapping of the block.
 */
#ifndef GUEST_BOOT_H
#define GUEST_BOOT_H

#define GUEST_VCPUS_MAX 8
#define GUEST_STACK 16384
#define GUEST_WINDOW 0x8000000000 /* the second entry of the page map */
#define GUEST_WINDOW_GIB 64
#define AP_PAGE 0x8000

#endif
