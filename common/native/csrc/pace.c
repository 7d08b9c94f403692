#include "pace.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

/* --- how much ----------------------------------------------------------- */

/* While pages are owed and requests share the main channel. */
#define POSTCOPY_BATCH_PAGES 64
/* A limited stream is cut into pieces of this time. */
#define SLICES_PER_SECOND 100

static uint32_t batch_size(const struct source *s, uint32_t most)
{
    uint64_t rate = __atomic_load_n(&s->limit.rate, __ATOMIC_RELAXED);
    uint64_t pages = rate / SLICES_PER_SECOND / TARGET_PAGE_SIZE;

    if (rate == 0 || pages >= most) {
        return most;
    }
    return pages ? (uint32_t)pages : 1;
}

uint32_t pace_pages(const struct source *s)
{
    return batch_size(s, BATCH_PAGES);
}

/* Bytes of one part: zero pages count for what they take on the wire. */
uint64_t pace_bytes(struct source *s)
{
    uint64_t bytes = flow_piece(&s->flow);
    uint64_t limited = (uint64_t)batch_size(s, POSTCOPY_BATCH_PAGES)
                       << TARGET_PAGE_BITS;

    return bytes < limited ? bytes : limited;
}

/* --- orders and the limit ----------------------------------------------- */

struct result pace_wake(struct source *s, int timeout_ms)
{
    struct pollfd fds[] = {
        { .fd = s->main->stop_fd, .events = POLLIN },
        { .fd = s->wake_fd, .events = POLLIN },
        { .fd = s->main->fd, .events = POLLRDHUP },
    };
    uint64_t drained;

    if (poll(fds, 3, timeout_ms) < 0 && errno != EINTR) {
        return result_errno(RESULT_HOST, "poll", errno);
    }
    if (fds[0].revents) {
        return result_of(RESULT_STOPPED, "stopped");
    }
    if (fds[2].revents) {
        return result_of(RESULT_CHANNEL, "the peer closed the channel");
    }
    (void)!read(s->wake_fd, &drained, sizeof(drained));
    return result_ok();
}

struct result pace_limit(struct source *s)
{
    for (;;) {
        uint64_t ns = limit_wait_ns(&s->limit);
        uint64_t drained;
        struct result r;

        if (ns == 0 || source_must_yield(s)) {
            return result_ok();
        }
        r = channel_poll(s->wake_fd, s->main->stop_fd, POLLIN,
                         (int)(ns / 1000000 + 1));
        if (!RESULT_IS_OK(r)) {
            return r;
        }
        (void)!read(s->wake_fd, &drained, sizeof(drained));
    }
}

/* --- the window --------------------------------------------------------- */

static struct result send_probe(struct source *s)
{
    struct result r;

    batch_reset(&s->batch);
    batch_add_mark(&s->batch, flow_probe(&s->flow, clock_ns()));
    channel_lock(s->main);
    r = channel_writev_locked(s->main, s->batch.iov, s->batch.iov_count);
    channel_unlock(s->main);
    return r;
}

static struct result wait_for_answer(struct source *s)
{
    __atomic_store_n(&s->flow_waits, 1, __ATOMIC_SEQ_CST);
    /* It may have come since we looked; then nobody wakes us. */
    if (flow_turn(&s->flow, clock_ns()) != FLOW_WAIT) {
        return result_ok();
    }
    return pace_wake(s, -1);
}

/* Until the peer has taken so much that more may be sent ahead. */
static struct result wait_for_flow(struct source *s)
{
    for (;;) {
        struct result r = result_ok();

        switch (flow_turn(&s->flow, clock_ns())) {
        case FLOW_SEND:
            return r;
        case FLOW_PROBE:
            r = send_probe(s);
            break;
        case FLOW_WAIT:
            r = wait_for_answer(s);
            break;
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
}

bool pace_take_answer_untrusted(struct source *s, uint32_t value)
{
    if (!wire_is_mark(value)) {
        return false;
    }
    if (flow_answer_untrusted(&s->flow, value & WIRE_MARK_BITS, clock_ns()) &&
        __atomic_exchange_n(&s->flow_waits, 0, __ATOMIC_SEQ_CST)) {
        source_wake(s);
    }
    return true;
}

/* --- requests first ----------------------------------------------------- */

/*
 * While faults come, each part leaves the processors to them for a moment: on a
 * machine that the stream keeps busy a woken thread waits for whole system
 * calls of the stream to end, and the pages behind the fault come later by less
 * than the fault would.
 */
#define FAULTS_COME_NS UINT64_C(300000)
#define PAUSE_NS 30000L

static uint64_t since_fault_ns(const struct source *s)
{
    uint64_t served = __atomic_load_n(&s->served_ns, __ATOMIC_RELAXED);
    uint64_t now = clock_ns();

    return now > served ? now - served : 0;
}

void pace_leave_processors(struct source *s)
{
    struct timespec pause = { .tv_nsec = PAUSE_NS };

    if (since_fault_ns(s) < FAULTS_COME_NS) {
        (void)clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
        STATS_ADD(s->stats.background_pauses, 1);
    }
}

/*
 * A guest that has just begun waits for some hundred pages one after another,
 * and on a slow link each part would be in front of the next of them. So they
 * get the link too: the stream goes on when no fault has come for the time of a
 * few pages, or when it has stood still for long, so that it learns about the
 * link. Only in the beginning: later it matters that all pages come. And not
 * when it is known which pages these are: then they are the stream.
 */
#define BEGINNING_NS UINT64_C(1000000000)
#define HELD_PAGES 24
#define HELD_NS UINT64_C(10000000)
#define HELD_AT_MOST_NS UINT64_C(50000000)

static bool is_beginning(const struct source *s)
{
    return clock_ns() - s->begun_ns < BEGINNING_NS &&
           !(s->stored && working_set_is_left(&s->stored->working_set));
}

static uint64_t held_ns(struct source *s)
{
    uint64_t ns = flow_link_ns(&s->flow, HELD_PAGES * TARGET_PAGE_SIZE);

    return ns < HELD_NS ? ns : HELD_NS;
}

static struct result leave_link(struct source *s)
{
    uint64_t end = clock_ns() + HELD_AT_MOST_NS;
    struct result r = result_ok();

    while (RESULT_IS_OK(r) && is_beginning(s) && clock_ns() < end) {
        uint64_t since = since_fault_ns(s);
        uint64_t held = held_ns(s);

        if (since >= held) {
            break;
        }
        r = pace_wake(s, (int)((held - since) / 1000000 + 1));
        STATS_ADD(s->stats.background_pauses, 1);
    }
    return r;
}

struct result pace_turn(struct source *s)
{
    struct result r = leave_link(s);

    if (RESULT_IS_OK(r)) {
        r = pace_limit(s);
    }
    if (RESULT_IS_OK(r)) {
        r = wait_for_flow(s);
    }
    return RESULT_IS_OK(r) ? channel_wait_room(s->main) : r;
}

/* What a guest asks for is only known if it gets nothing else. */
struct result pace_asking(struct source *s)
{
    uint64_t end = s->begun_ns + s->only_asked_ns;
    struct result r = result_ok();

    for (uint64_t now = clock_ns(); RESULT_IS_OK(r) && now < end;
         now = clock_ns()) {
        uint64_t ms = (end - now) / 1000000 + 1;

        r = pace_wake(s, ms < INT_MAX ? (int)ms : INT_MAX);
    }
    return r;
}
