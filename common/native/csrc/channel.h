/*
 * A byte channel over a descriptor: socket, pipe or file.
 *
 * One thread reads at a time; any number write, each under the channel's lock.
 * The lock is first come, first served, and whoever holds it writes one whole
 * unit of the stream (a section, a command, a record), so that the stream is
 * at a unit's border whenever the lock is free.
 *
 * Every wait is also a wait for `stop_fd`, an eventfd that the owner writes to
 * end all use of the channel; it stays readable until the owner drains it.
 * The descriptors stay the caller's.
 */
#ifndef POSTCOPY_CHANNEL_H
#define POSTCOPY_CHANNEL_H

#include "ram.h"

#include <pthread.h>
#include <sys/uio.h>

#define CHANNEL_BUFFER ((size_t)1 << 20)

struct channel {
    int fd;
    int stop_fd;
    bool is_socket;

    pthread_mutex_t mutex;
    pthread_cond_t turn;
    uint64_t ticket_next;               /* protected by mutex */
    uint64_t ticket_serving;            /* protected by mutex */
    const struct ram_block *last_block; /* CONTINUE state of the writer,
                                           protected by the channel's lock */
    uint64_t bytes_sent;                /* atomic; written under the lock */

    uint8_t *buffer; /* what was read ahead: [start, end) */
    size_t start;
    size_t end;
    uint64_t bytes_received; /* atomic; the reader's */
};

/* Makes `fd` non-blocking. */
struct result channel_open(struct channel *c, int fd, int stop_fd);
void channel_close(struct channel *c);

/* Returns true if another thread had the lock and this one had to wait. */
bool channel_lock(struct channel *c);
void channel_unlock(struct channel *c);

/* Write all of `iov`, which is used up on the way. The lock must be held. */
struct result channel_writev_locked(struct channel *c, struct iovec *iov,
                                    size_t count);
/* Lock, write, unlock. */
struct result channel_write(struct channel *c, const void *data, size_t size);

/*
 * Wait until the kernel has room for more; with TCP_NOTSENT_LOWAT set that is
 * when little is left unsent. Regular files always have room.
 */
struct result channel_wait_room(struct channel *c);
/*
 * Keep at most `bytes` unsent in the kernel before channel_wait_room() says
 * that there is room. Does nothing where the transport has no such notion.
 */
void channel_limit_unsent(struct channel *c, uint32_t bytes);

/*
 * Acknowledge what was read now. A peer without TCP_NODELAY, as a QEMU that is
 * a destination, holds its next message back until then; and the kernel waits
 * up to 40 ms in the hope of something to send along. Not for long: call it
 * whenever something was read. Does nothing where there is no such thing.
 */
void channel_acknowledge(struct channel *c);
/*
 * Have at least `want` bytes (at most CHANNEL_BUFFER) buffered at
 * buffer + start. RESULT_CLOSED: the peer closed before that.
 */
struct result channel_fill(struct channel *c, size_t want);
/* What is buffered now, without waiting. */
static inline size_t channel_buffered(const struct channel *c)
{
    return c->end - c->start;
}
static inline void channel_consume(struct channel *c, size_t size)
{
    c->start += size;
}
/* Forget what is buffered. */
static inline void channel_skip(struct channel *c)
{
    c->start = c->end = 0;
}
/* Bytes consumed so far: where in the stream the reader stands. */
uint64_t channel_position(const struct channel *c);

/* Exactly `size` bytes, or RESULT_CLOSED. */
struct result channel_read(struct channel *c, void *data, size_t size);

/* Wait for `events` on fd; RESULT_STOPPED if the stop descriptor is first. */
struct result channel_poll(int fd, int stop_fd, short events, int timeout_ms);

#endif
