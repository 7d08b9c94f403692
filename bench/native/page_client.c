#include "page_client.h"
#include "account.h"
#include "memory.h"
#include "placing.h"
#include "tcp.h"
#include "uffd.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#define EVENTS_MAX 32u
#define CHUNK (1u << 20)

/* Connecting */

static bool open_event(int *event, struct fail *why)
{
    *event = eventfd(0, EFD_CLOEXEC);
    return *event >= 0 || fail(why, "no eventfd: %s", strerror(errno));
}

static bool allocate(uint8_t **buffer, size_t size, struct fail *why)
{
    *buffer = aligned_alloc(SMALL_PAGE, size);
    if (!*buffer)
        return fail(why, "no memory for a buffer of %zu bytes", size);
    memset(*buffer, 0, size);
    return true;
}

static bool order(const struct page_server *s, const struct page_target *t,
                  enum page_role role, uint64_t rate, int *connection,
                  struct fail *why)
{
    struct page_order o = { .role = role,
                            .page_size = t->page_size,
                            .start = t->start,
                            .end = t->end,
                            .rate = rate };

    *connection = page_server_order(s, &o, why);
    return *connection >= 0;
}

bool page_fetcher_open(struct page_fetcher *f, const struct page_target *t,
                       const struct page_server *s, struct fail *why)
{
    f->target = *t;
    return open_event(&f->stop, why) && open_event(&f->finished, why) &&
           allocate(&f->page, t->page_size, why) &&
           order(s, t, PAGE_REQUESTS, 0, &f->connection, why);
}

/* Bytes that are received before they are placed; whole pages. */
static size_t chunk_of(const struct page_target *t)
{
    return t->page_size > CHUNK ? t->page_size : CHUNK;
}

bool page_filler_open(struct page_filler *f, const struct page_target *t,
                      uint64_t rate, const struct page_server *s,
                      struct fail *why)
{
    f->target = *t;
    return open_event(&f->finished, why) &&
           allocate(&f->buffer, chunk_of(t), why) &&
           order(s, t, PAGE_ALL, rate, &f->connection, why);
}

/* Fetching */

/* True without an event when it is time to stop. */
static bool wait_for_events(const struct page_fetcher *f, bool *stopped,
                            struct fail *why)
{
    struct pollfd wanted[] = { { f->target.userfaultfd, POLLIN, 0 },
                               { f->stop, POLLIN, 0 } };

    while (poll(wanted, 2, -1) < 0) {
        if (errno != EINTR)
            return fail(why, "cannot wait for faults: %s", strerror(errno));
    }
    *stopped = wanted[1].revents != 0;
    return true;
}

static bool request(const struct page_fetcher *f,
                    const struct uffd_fault *faults, uint32_t count,
                    uint64_t *offsets, struct fail *why)
{
    const struct page_target *t = &f->target;

    for (uint32_t i = 0; i < count; i++) {
        uint64_t offset = faults[i].address - (uintptr_t)t->base;

        offsets[i] = offset / t->page_size * t->page_size;
    }
    return tcp_send_bytes(f->connection, offsets, count * sizeof(*offsets),
                          why);
}

static bool resolve(struct page_fetcher *f, uint64_t offset, struct fail *why)
{
    const struct page_target *t = &f->target;

    if (!tcp_receive_bytes(f->connection, f->page, t->page_size, why) ||
        !place_copy(t->userfaultfd, t->base + offset, f->page, t->page_size,
                    t->page_size, why))
        return false;
    f->faults++;
    return true;
}

static bool resolve_events(struct page_fetcher *f, struct fail *why)
{
    struct uffd_fault faults[EVENTS_MAX];
    uint64_t offsets[EVENTS_MAX];
    uint32_t count;
    struct result r =
        uffd_read(f->target.userfaultfd, faults, EVENTS_MAX, &count);

    if (!RESULT_IS_OK(r))
        return fail(why, "%s: %s", r.what, strerror(r.err));
    if (count > 0 && !request(f, faults, count, offsets, why))
        return false;
    for (uint32_t i = 0; i < count; i++) {
        if (!resolve(f, offsets[i], why))
            return false;
    }
    return true;
}

static bool fetch(struct page_fetcher *f, struct fail *why)
{
    bool stopped = false;

    while (!f->limit || f->faults < f->limit) {
        if (!wait_for_events(f, &stopped, why))
            return false;
        if (stopped)
            return true;
        if (!resolve_events(f, why))
            return false;
    }
    return true;
}

static void *fetcher_main(void *argument)
{
    struct page_fetcher *f = argument;

    f->good = fetch(f, &f->why);
    f->cpu_seconds = cpu_of_this_thread();
    eventfd_write(f->finished, 1);
    return NULL;
}

/* Filling */

static void sample(struct page_filler *f, uint64_t bytes)
{
    uint64_t all = f->target.end - f->target.start;

    if (bytes < all / PAGE_SAMPLES * (f->sample_count + 1) ||
        f->sample_count == PAGE_SAMPLES)
        return;
    f->samples[f->sample_count++] =
        (struct page_sample){ clock_seconds() - f->started, bytes };
}

static bool fill(struct page_filler *f, struct fail *why)
{
    const struct page_target *t = &f->target;
    uint64_t chunk = chunk_of(t);

    if (!tcp_send_bytes(f->connection, "", 1, why))
        return false;
    for (uint64_t at = t->start; at < t->end;) {
        uint64_t n = t->end - at < chunk ? t->end - at : chunk;

        if (!tcp_receive_bytes(f->connection, f->buffer, n, why) ||
            !place_copy(t->userfaultfd, t->base + at, f->buffer, n,
                        t->page_size, why))
            return false;
        at += n;
        sample(f, at - t->start);
    }
    return true;
}

static void *filler_main(void *argument)
{
    struct page_filler *f = argument;

    f->good = fill(f, &f->why);
    f->cpu_seconds = cpu_of_this_thread();
    eventfd_write(f->finished, 1);
    return NULL;
}

/* Threads */

static bool start(pthread_t *thread, void *(*run)(void *), void *argument,
                  struct fail *why)
{
    int error = pthread_create(thread, NULL, run, argument);

    return error == 0 ||
           fail(why, "cannot start a thread: %s", strerror(error));
}

bool page_fetcher_start(struct page_fetcher *f, struct fail *why)
{
    return start(&f->thread, fetcher_main, f, why);
}

bool page_filler_start(struct page_filler *f, struct fail *why)
{
    f->started = clock_seconds();
    return start(&f->thread, filler_main, f, why);
}

bool page_fetcher_join(struct page_fetcher *f, struct fail *why)
{
    pthread_join(f->thread, NULL);
    return f->good || fail(why, "fetching pages: %s", f->why.text);
}

bool page_filler_join(struct page_filler *f, struct fail *why)
{
    pthread_join(f->thread, NULL);
    return f->good || fail(why, "filling pages: %s", f->why.text);
}
