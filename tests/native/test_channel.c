#include "channel.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static void shrink_buffers(const struct line *l)
{
    int small = 1; /* the kernel makes it its least */

    NEED(setsockopt(l->fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);
    NEED(setsockopt(l->peer, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) ==
         0);
}

static uint8_t byte_at(size_t i)
{
    return (uint8_t)(i * 31 + (i >> 8) + (i >> 16));
}

static uint8_t *make_bytes(size_t size)
{
    uint8_t *bytes = malloc(size);

    NEED(bytes);
    for (size_t i = 0; i < size; i++) {
        bytes[i] = byte_at(i);
    }
    return bytes;
}

struct transfer {
    struct line *line;
    uint8_t *bytes;
    size_t size;
};

/* More pieces than one system call takes, some of them empty. */
#define PIECES (2 * IOV_MAX + 3)

static struct result write_pieces(void *arg)
{
    struct transfer *t = arg;
    static struct iovec iov[PIECES];
    size_t at = 0;
    struct result r;

    for (size_t i = 0; i < PIECES; i++) {
        size_t n = i % 7 == 3 ? 0 : (i * 13) % 1500;

        n = i == PIECES - 1 ? t->size - at : n;
        iov[i] = (struct iovec){ .iov_base = t->bytes + at, .iov_len = n };
        at += n;
    }
    channel_lock(&t->line->channel);
    r = channel_writev_locked(&t->line->channel, iov, PIECES);
    channel_unlock(&t->line->channel);
    return r;
}

static void test_write_in_small_steps(void)
{
    struct line l;
    struct job job;
    struct transfer t = { .line = &l, .size = 3000000 };
    uint8_t *got = malloc(t.size);

    line_open(&l);
    shrink_buffers(&l);
    t.bytes = make_bytes(t.size);
    job_start(&job, write_pieces, &t);
    receive_all(l.peer, got, t.size);
    CHECK(RESULT_IS_OK(job_wait(&job)));
    CHECK_BYTES(got, t.bytes, t.size);
    CHECK_EQ(l.channel.bytes_sent, t.size);
    CHECK(!is_readable(l.peer));
    free(t.bytes);
    free(got);
    line_close(&l);
}

static struct result send_bytes(void *arg)
{
    struct transfer *t = arg;

    send_all(t->line->peer, t->bytes, t->size);
    return result_ok();
}

/* Reads of all sizes, also larger than the buffer, find their bytes. */
static void test_read_in_small_steps(void)
{
    struct line l;
    struct job job;
    struct transfer t = { .line = &l, .size = 3 * CHANNEL_BUFFER };
    uint8_t *got = malloc(t.size);
    size_t at = 0;

    line_open(&l);
    shrink_buffers(&l);
    t.bytes = make_bytes(t.size);
    job_start(&job, send_bytes, &t);
    for (size_t n = 0; at < t.size; n = n * 3 + 1) {
        n = n > CHANNEL_BUFFER + 5 ? 1 : n;
        n = n < t.size - at ? n : t.size - at;
        CHECK(RESULT_IS_OK(channel_read(&l.channel, got + at, n)));
        at += n;
        CHECK_EQ(channel_position(&l.channel), at);
    }
    job_wait(&job);
    CHECK_BYTES(got, t.bytes, t.size);
    CHECK_EQ(l.channel.bytes_received, t.size);
    free(t.bytes);
    free(got);
    line_close(&l);
}

static void test_fill_and_consume(void)
{
    struct line l;

    line_open(&l);
    send_all(l.peer, "abcdef", 6);
    CHECK(RESULT_IS_OK(channel_fill(&l.channel, 2)));
    CHECK_EQ(channel_buffered(&l.channel), 6);
    CHECK_BYTES(l.channel.buffer + l.channel.start, "abcdef", 6);
    channel_consume(&l.channel, 4);
    CHECK_EQ(channel_position(&l.channel), 4);
    send_all(l.peer, "ghi", 3);
    CHECK(RESULT_IS_OK(channel_fill(&l.channel, 5)));
    CHECK_BYTES(l.channel.buffer + l.channel.start, "efghi", 5);
    line_close(&l);
}

/* What was read before the end is still there, and the end stays. */
static void test_peer_closes(void)
{
    struct line l;
    uint8_t got[8];

    line_open(&l);
    send_all(l.peer, "abcde", 5);
    line_hang_up(&l);
    CHECK(RESULT_IS_OK(channel_read(&l.channel, got, 2)));
    CHECK_EQ(channel_read(&l.channel, got, 4).kind, RESULT_CLOSED);
    CHECK_EQ(channel_buffered(&l.channel), 3);
    CHECK_EQ(channel_fill(&l.channel, 4).kind, RESULT_CLOSED);
    CHECK(RESULT_IS_OK(channel_read(&l.channel, got, 3)));
    CHECK_BYTES(got, "cde", 3);
    line_close(&l);
}

static void test_write_to_closed_peer(void)
{
    struct line l;
    struct result r;

    line_open(&l);
    line_hang_up(&l);
    r = channel_write(&l.channel, "x", 1);
    CHECK_EQ(r.kind, RESULT_CHANNEL);
    CHECK_EQ(r.err, EPIPE);
    /* The lock is free again. */
    CHECK(!channel_lock(&l.channel));
    channel_unlock(&l.channel);
    line_close(&l);
}

static struct result read_one(void *arg)
{
    uint8_t byte;

    return channel_read(arg, &byte, 1);
}

static void test_stop_ends_read(void)
{
    struct line l;
    struct job job;
    uint8_t byte;

    line_open(&l);
    job_start(&job, read_one, &l.channel);
    set_event(l.stop_fd);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    /* Until the owner drains it. */
    CHECK_EQ(channel_read(&l.channel, &byte, 1).kind, RESULT_STOPPED);
    line_close(&l);
}

static struct result write_for_ever(void *arg)
{
    static const uint8_t bytes[65536];
    struct result r;

    do {
        r = channel_write(arg, bytes, sizeof(bytes));
    } while (RESULT_IS_OK(r));
    return r;
}

static void test_stop_ends_write(void)
{
    struct line l;
    struct job jobs[2];

    line_open(&l);
    for (size_t i = 0; i < 2; i++) {
        job_start(&jobs[i], write_for_ever, &l.channel);
    }
    /* One is in write or about to be, the other waits for the lock. */
    while (!__atomic_load_n(&l.channel.bytes_sent, __ATOMIC_RELAXED)) {
    }
    set_event(l.stop_fd);
    for (size_t i = 0; i < 2; i++) {
        CHECK_EQ(job_wait(&jobs[i]).kind, RESULT_STOPPED);
    }
    line_close(&l);
}

#define QUEUE 8

struct queue {
    struct channel *channel;
    uint32_t *order;
    uint32_t *served;
    uint32_t index;
};

static struct result take_turn(void *arg)
{
    struct queue *q = arg;
    bool waited = channel_lock(q->channel);

    q->order[(*q->served)++] = q->index;
    channel_unlock(q->channel);
    return waited ? result_ok() : result_of(RESULT_HOST, "did not wait");
}

static uint64_t tickets(struct channel *c)
{
    uint64_t n;

    pthread_mutex_lock(&c->mutex);
    n = c->ticket_next;
    pthread_mutex_unlock(&c->mutex);
    return n;
}

static void test_lock_is_first_come_first_served(void)
{
    struct line l;
    struct job jobs[QUEUE];
    struct queue queue[QUEUE];
    uint32_t order[QUEUE];
    uint32_t served = 0;

    line_open(&l);
    CHECK(!channel_lock(&l.channel));
    for (uint32_t i = 0; i < QUEUE; i++) {
        queue[i] = (struct queue){ &l.channel, order, &served, i };
        job_start(&jobs[i], take_turn, &queue[i]);
        while (tickets(&l.channel) != i + 2) {
        }
    }
    channel_unlock(&l.channel);
    for (uint32_t i = 0; i < QUEUE; i++) {
        CHECK(RESULT_IS_OK(job_wait(&jobs[i])));
    }
    for (uint32_t i = 0; i < QUEUE; i++) {
        CHECK_EQ(order[i], i);
    }
    line_close(&l);
}

#define UNIT 3000
#define UNITS 200
#define WRITERS 4

struct writer {
    struct channel *channel;
    uint8_t letter;
};

static struct result write_units(void *arg)
{
    struct writer *w = arg;
    uint8_t unit[UNIT];
    struct result r = result_ok();

    memset(unit, w->letter, sizeof(unit));
    for (int i = 0; i < UNITS && RESULT_IS_OK(r); i++) {
        r = channel_write(w->channel, unit, sizeof(unit));
    }
    return r;
}

/* The stream of several writers is made of whole units. */
static void test_units_stay_whole(void)
{
    struct line l;
    struct job jobs[WRITERS];
    struct writer writers[WRITERS];
    uint32_t units[WRITERS] = { 0 };

    line_open(&l);
    shrink_buffers(&l);
    for (size_t i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){ &l.channel, (uint8_t)i };
        job_start(&jobs[i], write_units, &writers[i]);
    }
    for (size_t i = 0; i < UNITS * WRITERS; i++) {
        uint8_t unit[UNIT];

        receive_all(l.peer, unit, sizeof(unit));
        CHECK_BYTES(unit, unit + 1, UNIT - 1);
        CHECK(unit[0] < WRITERS);
        units[unit[0]]++;
    }
    for (size_t i = 0; i < WRITERS; i++) {
        CHECK(RESULT_IS_OK(job_wait(&jobs[i])));
        CHECK_EQ(units[i], UNITS);
    }
    line_close(&l);
}

/* Fill the kernel's buffer, so that the next write has to wait. */
static size_t fill_socket(int fd)
{
    static const uint8_t bytes[4096];
    size_t sent = 0;
    ssize_t n;

    while ((n = send(fd, bytes, sizeof(bytes), MSG_DONTWAIT)) > 0) {
        sent += (size_t)n;
    }
    return sent;
}

static struct result wait_room(void *arg)
{
    return channel_wait_room(arg);
}

static void test_wait_room(void)
{
    struct line l;
    struct job job;
    uint8_t *drain;
    size_t full;

    line_open(&l);
    CHECK(RESULT_IS_OK(channel_wait_room(&l.channel)));
    full = fill_socket(l.fd);
    CHECK_EQ(channel_poll(l.fd, l.stop_fd, POLLOUT, 0).kind, RESULT_OK);
    job_start(&job, wait_room, &l.channel);
    drain = malloc(full);
    receive_all(l.peer, drain, full);
    free(drain);
    CHECK(RESULT_IS_OK(job_wait(&job)));

    fill_socket(l.fd);
    job_start(&job, wait_room, &l.channel);
    set_event(l.stop_fd);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    line_close(&l);
}

static void test_poll_times_out(void)
{
    struct line l;

    line_open(&l);
    CHECK(RESULT_IS_OK(channel_poll(l.fd, l.stop_fd, POLLIN, 1)));
    set_event(l.stop_fd);
    CHECK_EQ(channel_poll(l.fd, l.stop_fd, POLLIN, -1).kind, RESULT_STOPPED);
    line_close(&l);
}

/* Files and pipes are channels, too. */
static void test_file(void)
{
    struct channel c;
    int stop = make_event();
    int fd = memfd_create("file", MFD_CLOEXEC);
    uint8_t got[5];

    CHECK(RESULT_IS_OK(channel_open(&c, fd, stop)));
    CHECK(!c.is_socket);
    CHECK(RESULT_IS_OK(channel_write(&c, "hello", 5)));
    CHECK(RESULT_IS_OK(channel_write(&c, "", 0)));
    CHECK(RESULT_IS_OK(channel_wait_room(&c)));
    CHECK_EQ(lseek(fd, 0, SEEK_SET), 0);
    CHECK(RESULT_IS_OK(channel_read(&c, got, 5)));
    CHECK_BYTES(got, "hello", 5);
    CHECK_EQ(channel_read(&c, got, 1).kind, RESULT_CLOSED);
    channel_close(&c);
    close(fd);
    close(stop);
}

static void test_pipe(void)
{
    struct channel in;
    struct channel out;
    int stop = make_event();
    uint8_t got[5];
    int fds[2];

    CHECK_EQ(pipe(fds), 0);
    CHECK(RESULT_IS_OK(channel_open(&in, fds[0], stop)));
    CHECK(RESULT_IS_OK(channel_open(&out, fds[1], stop)));
    CHECK(RESULT_IS_OK(channel_write(&out, "hello", 5)));
    CHECK(RESULT_IS_OK(channel_read(&in, got, 5)));
    CHECK_BYTES(got, "hello", 5);
    close(fds[0]);
    signal(SIGPIPE, SIG_IGN); /* as in every Python program */
    CHECK_EQ(channel_write(&out, "hello", 5).err, EPIPE);
    signal(SIGPIPE, SIG_DFL);
    close(fds[1]);
    channel_close(&in);
    channel_close(&out);
    close(stop);
}

static void test_bad_descriptor(void)
{
    struct channel c;
    struct result r = channel_open(&c, -1, -1);

    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EBADF);
    channel_close(&c);
}

static void test_limit_unsent(void)
{
    struct channel c;
    int stop = make_event();
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unsigned value = 0;
    socklen_t size = sizeof(value);
    struct line l;

    CHECK(RESULT_IS_OK(channel_open(&c, fd, stop)));
    channel_limit_unsent(&c, 100000);
    CHECK_EQ(getsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &value, &size), 0);
    CHECK_EQ(value, 100000);
    channel_close(&c);
    close(fd);
    close(stop);
    line_open(&l);
    channel_limit_unsent(&l.channel, 100000);
    CHECK(RESULT_IS_OK(channel_write(&l.channel, "x", 1)));
    line_close(&l);
}

int main(void)
{
    RUN(test_write_in_small_steps);
    RUN(test_read_in_small_steps);
    RUN(test_fill_and_consume);
    RUN(test_peer_closes);
    RUN(test_write_to_closed_peer);
    RUN(test_stop_ends_read);
    RUN(test_stop_ends_write);
    RUN(test_lock_is_first_come_first_served);
    RUN(test_units_stay_whole);
    RUN(test_wait_room);
    RUN(test_poll_times_out);
    RUN(test_file);
    RUN(test_pipe);
    RUN(test_bad_descriptor);
    RUN(test_limit_unsent);
    return check_status();
}
