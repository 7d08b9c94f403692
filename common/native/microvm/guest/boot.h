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
#define TIMER_VECTOR 0x40

/* The local APIC. */
#define APIC_BASE 0xfee00000
#define APIC_INTERRUPT_END 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_COMMAND_LOW 0x300
#define APIC_TIMER 0x320
#define APIC_LINE_0 0x350
#define APIC_LINE_1 0x360
#define APIC_TIMER_COUNT 0x380
#define APIC_TIMER_DIVIDE 0x3e0

#endif
