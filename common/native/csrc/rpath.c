#include "rpath.h"

#include "pace.h"
#include "turn.h"
#include "urgent.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#define REQ_PAGES_LENGTH 12 /* be64 start, be32 length */

/*
 * The preempt channel brings the source nothing; what shows there is its end.
 * Without this a page written to a socket that the peer has closed is gone
 * without an error, and the guest waits for it for ever.
 */
static struct result wait_for_message(struct source *s)
{
    struct channel *urgent = source_urgent(s);
    struct pollfd fds[] = {
        { .fd = s->main->stop_fd, .events = POLLIN },
        { .fd = s->main->fd, .events = POLLIN },
        { .fd = urgent != s->main ? urgent->fd : -1, .events = POLLRDHUP },
    };
    struct timespec look = { .tv_nsec = ARRIVING_LOOK_NS };

    for (;;) {
        struct result r = urgent_serve_arrived(s);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        if (__atomic_load_n(&s->ended, __ATOMIC_SEQ_CST)) {
            fds[2].fd = -1;
        }
        if (ppoll(fds, 3, urgent_awaits(s) ? &look : NULL, NULL) < 0 &&
            errno != EINTR) {
            return result_errno(RESULT_HOST, "poll", errno);
        }
        if (fds[0].revents) {
            return result_of(RESULT_STOPPED, "stopped");
        }
        if (fds[1].revents) {
            return result_ok();
        }
        if (fds[2].revents && !__atomic_load_n(&s->ended, __ATOMIC_SEQ_CST)) {
            return result_of(RESULT_CLOSED, "preempt channel");
        }
    }
}

static struct result read_message_untrusted(struct source *s,
                                            struct rp_message *m)
{
    uint8_t head[4];
    struct result r = result_ok();

    if (!channel_buffered(s->main)) {
        channel_acknowledge(s->main);
        r = wait_for_message(s);
        s->read_ns = clock_ns(); /* of all that is read at once */
    }
    if (RESULT_IS_OK(r)) {
        r = channel_read(s->main, head, sizeof(head));
    }
    if (!RESULT_IS_OK(r)) {
        return r;
    }
    m->type = wire_get_be16(head);
    m->length = wire_get_be16(head + 2);
    if (m->length > RP_PAYLOAD_MAX) {
        return result_stream("return path message is too long",
                             channel_position(s->main), m->length);
    }
    return channel_read(s->main, m->payload, m->length);
}

/* Which block a request is about: named in it, or that of the one before. */
static struct ram_block *asked_block_untrusted(struct source *s,
                                               const struct rp_message *m)
{
    size_t name = REQ_PAGES_LENGTH;

    if (m->type == RP_REQ_PAGES) {
        return m->length == REQ_PAGES_LENGTH ? s->asked : NULL;
    }
    if (m->length < name + 1 || m->length != name + 1 + m->payload[name]) {
        return NULL;
    }
    s->asked = ram_find(s->ram, m->payload + name + 1, m->payload[name]);
    return s->asked;
}

static struct result serve_untrusted(struct source *s,
                                     const struct rp_message *m)
{
    struct ram_block *b = asked_block_untrusted(s, m);
    uint64_t start;
    uint64_t length;

    if (!b) {
        return result_stream("page request for a RAM block that is not here",
                             channel_position(s->main), m->type);
    }
    start = wire_get_be64(m->payload);
    length = wire_get_be32(m->payload + 8);
    if (start % b->page_size || length % b->page_size || !length ||
        start >= b->length || length > b->length - start) {
        return result_stream("page request that is not within its RAM block",
                             channel_position(s->main), start);
    }
    STATS_ADD(s->stats.requests, 1);
    for (uint64_t at = start; at < start + length; at += b->page_size) {
        struct result r = urgent_serve(s, b, at, s->read_ns);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

static bool is_answer_untrusted(struct source *s, const struct rp_message *m)
{
    return m->type == RP_PONG && m->length == 4 &&
           pace_take_answer_untrusted(s, wire_get_be32(m->payload));
}

static struct result answer_requests(struct source *s,
                                     struct rp_message *message)
{
    for (;;) {
        struct result r = read_message_untrusted(s, message);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        if (is_answer_untrusted(s, message)) {
            continue;
        }
        if (message->type != RP_REQ_PAGES && message->type != RP_REQ_PAGES_ID) {
            return r;
        }
        if (message->length < REQ_PAGES_LENGTH) {
            return result_stream("page request is too short",
                                 channel_position(s->main), message->length);
        }
        r = serve_untrusted(s, message);
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
}

struct result rpath_run(struct source *s, struct rp_message *message)
{
    struct result r;

    turn_take(TURN_URGENT);
    r = answer_requests(s, message);
    turn_take(TURN_USUAL);
    return r;
}

void rpath_open(struct rpath *rp)
{
    *rp = (struct rpath){ 0 };
    pthread_mutex_init(&rp->mutex, NULL);
}

void rpath_close(struct rpath *rp)
{
    pthread_mutex_destroy(&rp->mutex);
}

void rpath_connect(struct rpath *rp, struct channel *channel)
{
    pthread_mutex_lock(&rp->mutex);
    rp->channel = channel;
    rp->last = NULL;
    pthread_mutex_unlock(&rp->mutex);
}

static void put_be16(uint8_t *out, size_t value)
{
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
}

/* Returns the bytes written to `out`, at most REQUEST_MAX. */
#define REQUEST_MAX (4 + REQ_PAGES_LENGTH + 1 + IDSTR_MAX)

static size_t put_request(uint8_t *out, const struct ram_block *block,
                          uint64_t offset, uint64_t length, bool named)
{
    size_t size = REQ_PAGES_LENGTH;

    wire_put_be64(out + 4, offset);
    wire_put_be32(out + 12, (uint32_t)length);
    if (named) {
        out[4 + size++] = block->idstr_length;
        memcpy(out + 4 + size, block->idstr, block->idstr_length);
        size += block->idstr_length;
    }
    put_be16(out, named ? RP_REQ_PAGES_ID : RP_REQ_PAGES);
    put_be16(out + 2, size);
    return 4 + size;
}

struct result rpath_request(struct rpath *rp, const struct ram_block *block,
                            uint64_t offset, uint64_t length)
{
    uint8_t message[REQUEST_MAX];
    struct result r = result_ok();

    pthread_mutex_lock(&rp->mutex);
    if (rp->channel) {
        size_t size =
            put_request(message, block, offset, length, rp->last != block);

        rp->last = block;
        r = channel_write(rp->channel, message, size);
        __atomic_fetch_add(&rp->requests, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&rp->mutex);
    return r;
}

struct result rpath_pong(struct rpath *rp, uint32_t value)
{
    uint8_t message[8];
    struct result r = result_ok();

    put_be16(message, RP_PONG);
    put_be16(message + 2, 4);
    wire_put_be32(message + 4, value);
    pthread_mutex_lock(&rp->mutex);
    if (rp->channel) {
        r = channel_write(rp->channel, message, sizeof(message));
    }
    pthread_mutex_unlock(&rp->mutex);
    return r;
}
