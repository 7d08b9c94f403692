/*
 * The guest's serial port, output only. Lines are written whole, so that the
 * output of two programs on one terminal stays readable.
 */
#ifndef MICROVM_SERIAL_H
#define MICROVM_SERIAL_H

#include "fail.h"

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

struct serial {
    pthread_mutex_t lock; /* protects what follows */
    int fd;
    size_t used;
    char line[512];
    uint8_t scratch; /* not saved; see guest/ports.h */
};

/* `where` is "stdout" or "file:PATH". */
bool serial_open(struct serial *serial, const char *where, struct fail *why);

void serial_write(struct serial *serial, const char *bytes, size_t length);

/* The first of a PC's serial ports, at 0x3f8 to 0x3ff. */
bool serial_has_port(uint16_t port);
void serial_out(struct serial *serial, uint16_t port, uint8_t value);
uint8_t serial_in(struct serial *serial, uint16_t port);

#endif
