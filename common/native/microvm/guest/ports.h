/*
 * I/O ports the test guest uses.
 *
 * The serial port is the first of a PC. Its scratch register is no part of the
 * device state that microvm saves: a guest that finds its mark gone has come
 * to another microvm. (QEMU does save it, and the guest doesn't notice.)
 *
 * The nap port is microvm's own: writing N makes the vCPU rest N microseconds.
 * Elsewhere nothing listens there and the guest spins, unless it is told to
 * rest in another way (see settings.h).
 */
#ifndef GUEST_PORTS_H
#define GUEST_PORTS_H

#define PORT_SERIAL_DATA 0x3f8
#define PORT_SERIAL_LINE_STATUS 0x3fd
#define PORT_SERIAL_SCRATCH 0x3ff
#define SERIAL_TRANSMITTER_EMPTY 0x60

#define PORT_NAP 0x0e90

/* The keyboard controller's way to reset a PC. */
#define PORT_RESET 0x64
#define RESET_COMMAND 0xfe

#endif
