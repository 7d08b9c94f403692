#include "serial.h"
#include "guest/ports.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

bool serial_open(struct serial *serial, const char *where, struct fail *why)
{
    *serial = (struct serial){ .fd = STDOUT_FILENO };
    pthread_mutex_init(&serial->lock, NULL);
    if (strcmp(where, "stdout") == 0)
        return true;
    if (strncmp(where, "file:", 5) != 0)
        return fail(why, "--serial is 'stdout' or 'file:PATH', not '%s'",
                    where);
    serial->fd =
        open(where + 5, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (serial->fd < 0)
        return fail(why, "cannot open %s: %s", where + 5, strerror(errno));
    return true;
}

/* A guest must not stop because nobody reads its output: errors are lost. */
static void flush_locked(struct serial *serial)
{
    ssize_t written = write(serial->fd, serial->line, serial->used);

    (void)written;
    serial->used = 0;
}

static void put_locked(struct serial *serial, char byte)
{
    serial->line[serial->used++] = byte;
    if (byte == '\n' || serial->used == sizeof(serial->line))
        flush_locked(serial);
}

void serial_write(struct serial *serial, const char *bytes, size_t length)
{
    pthread_mutex_lock(&serial->lock);
    for (size_t i = 0; i < length; i++)
        put_locked(serial, bytes[i]);
    pthread_mutex_unlock(&serial->lock);
}

bool serial_has_port(uint16_t port)
{
    return port >= PORT_SERIAL_DATA && port <= PORT_SERIAL_SCRATCH;
}

void serial_out(struct serial *serial, uint16_t port, uint8_t value)
{
    pthread_mutex_lock(&serial->lock);
    if (port == PORT_SERIAL_DATA)
        put_locked(serial, (char)value);
    else if (port == PORT_SERIAL_SCRATCH)
        serial->scratch = value;
    pthread_mutex_unlock(&serial->lock);
}

uint8_t serial_in(struct serial *serial, uint16_t port)
{
    uint8_t value = 0;

    pthread_mutex_lock(&serial->lock);
    if (port == PORT_SERIAL_LINE_STATUS)
        value = SERIAL_TRANSMITTER_EMPTY;
    else if (port == PORT_SERIAL_SCRATCH)
        value = serial->scratch;
    pthread_mutex_unlock(&serial->lock);
    return value;
}
