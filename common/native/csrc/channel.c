#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

struct result channel_open(struct channel *c, int fd, int stop_fd)
{
    struct stat st;
    int flags = fcntl(fd, F_GETFL);

    *c = (struct channel){ .fd = fd, .stop_fd = stop_fd };
    if (flags < 0 || fstat(fd, &st) < 0) {
        return result_errno(RESULT_HOST, "descriptor of a channel", errno);
    }
    if (fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
        return result_errno(RESULT_HOST, "O_NONBLOCK on a channel", errno);
    }
    c->buffer = malloc(CHANNEL_BUFFER);
    if (!c->buffer) {
        return result_errno(RESULT_HOST, "channel buffer", ENOMEM);
    }
    c->is_socket = S_ISSOCK(st.st_mode);
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->turn, NULL);
    return result_ok();
}

void channel_close(struct channel *c)
{
    if (c->buffer) {
        free(c->buffer);
        pthread_mutex_destroy(&c->mutex);
        pthread_cond_destroy(&c->turn);
    }
    *c = (struct channel){ .fd = -1, .stop_fd = -1 };
}

bool channel_lock(struct channel *c)
{
    bool waited = false;
    uint64_t ticket;

    pthread_mutex_lock(&c->mutex);
    ticket = c->ticket_next++;
    while (ticket != c->ticket_serving) {
        waited = true;
        pthread_cond_wait(&c->turn, &c->mutex);
    }
    pthread_mutex_unlock(&c->mutex);
    return waited;
}

void channel_unlock(struct channel *c)
{
    pthread_mutex_lock(&c->mutex);
    c->ticket_serving++;
    pthread_cond_broadcast(&c->turn);
    pthread_mutex_unlock(&c->mutex);
}

struct result channel_poll(int fd, int stop_fd, short events, int timeout_ms)
{
    struct pollfd fds[] = {
        { .fd = stop_fd, .events = POLLIN },
        { .fd = fd, .events = events },
    };

    for (;;) {
        int n = poll(fds, 2, timeout_ms);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return result_errno(RESULT_HOST, "poll", errno);
        }
        if (fds[0].revents) {
            return result_of(RESULT_STOPPED, "stopped");
        }
        return result_ok();
    }
}

static ssize_t send_some(struct channel *c, struct iovec *iov, size_t count)
{
    int n = count > IOV_MAX ? IOV_MAX : (int)count;

    if (c->is_socket) {
        struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)n };

        return sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    return writev(c->fd, iov, n);
}

/* Drop `done` bytes from the front; returns the entries that are used up. */
static size_t advance(struct iovec *iov, size_t count, size_t done)
{
    size_t i = 0;

    while (i < count && done >= iov[i].iov_len) {
        done -= iov[i++].iov_len;
    }
    if (i < count) {
        iov[i].iov_base = (uint8_t *)iov[i].iov_base + done;
        iov[i].iov_len -= done;
    }
    return i;
}

struct result channel_writev_locked(struct channel *c, struct iovec *iov,
                                    size_t count)
{
    while (count) {
        ssize_t n = send_some(c, iov, count);

        if (n >= 0) {
            size_t used = advance(iov, count, (size_t)n);

            __atomic_fetch_add(&c->bytes_sent, (uint64_t)n, __ATOMIC_RELAXED);
            iov += used;
            count -= used;
        } else if (errno == EAGAIN) {
            struct result r = channel_poll(c->fd, c->stop_fd, POLLOUT, -1);

            if (!RESULT_IS_OK(r)) {
                return r;
            }
        } else if (errno != EINTR) {
            return result_errno(RESULT_CHANNEL, "writing to the channel",
                                errno);
        }
    }
    return result_ok();
}

struct result channel_write(struct channel *c, const void *data, size_t size)
{
    struct iovec iov = { .iov_base = (void *)(uintptr_t)data, .iov_len = size };
    struct result r;

    channel_lock(c);
    r = channel_writev_locked(c, &iov, size ? 1 : 0);
    channel_unlock(c);
    return r;
}

struct result channel_wait_room(struct channel *c)
{
    return channel_poll(c->fd, c->stop_fd, POLLOUT, -1);
}

void channel_limit_unsent(struct channel *c, uint32_t bytes)
{
    int value = (int)bytes;

    /* Fails on what is not TCP; the socket buffer is the bound there. */
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &value,
                     sizeof(value));
}

void channel_acknowledge(struct channel *c)
{
    int on = 1;

    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof(on));
}

static ssize_t receive_some(struct channel *c)
{
    uint8_t *at = c->buffer + c->end;
    size_t room = CHANNEL_BUFFER - c->end;

    return c->is_socket ? recv(c->fd, at, room, MSG_DONTWAIT) :
                          read(c->fd, at, room);
}

struct result channel_fill(struct channel *c, size_t want)
{
    if (channel_buffered(c) >= want) {
        return result_ok();
    }
    /* What is left over is less than one record: moving it is cheap. */
    memmove(c->buffer, c->buffer + c->start, channel_buffered(c));
    c->end -= c->start;
    c->start = 0;
    while (channel_buffered(c) < want) {
        ssize_t n = receive_some(c);

        if (n > 0) {
            c->end += (size_t)n;
            __atomic_fetch_add(&c->bytes_received, (uint64_t)n,
                               __ATOMIC_RELAXED);
        } else if (n == 0) {
            return result_of(RESULT_CLOSED, "the peer closed the channel");
        } else if (errno == EAGAIN) {
            struct result r = channel_poll(c->fd, c->stop_fd, POLLIN, -1);

            if (!RESULT_IS_OK(r)) {
                return r;
            }
        } else if (errno != EINTR) {
            return result_errno(RESULT_CHANNEL, "reading from the channel",
                                errno);
        }
    }
    return result_ok();
}

uint64_t channel_position(const struct channel *c)
{
    return __atomic_load_n(&c->bytes_received, __ATOMIC_RELAXED) -
           channel_buffered(c);
}

struct result channel_read(struct channel *c, void *data, size_t size)
{
    uint8_t *out = data;

    while (size) {
        size_t n = size < CHANNEL_BUFFER ? size : CHANNEL_BUFFER;
        struct result r = channel_fill(c, n);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        memcpy(out, c->buffer + c->start, n);
        channel_consume(c, n);
        out += n;
        size -= n;
    }
    return result_ok();
}
