#include "fault.h"

#include "channel.h"
#include "turn.h"
#include "uffd.h"

#include <poll.h>

#define FAULTS 32

static struct result handle_fault(struct destination *d,
                                  const struct uffd_fault *fault)
{
    struct ram_block *b = ram_at(d->ram, fault->address);
    uint64_t host;

    STATS_ADD(d->stats.faults, 1);
    if (!b) {
        return result_stream("fault outside all RAM blocks", fault->address, 0);
    }
    host = (fault->address - b->base) >> b->host_bits;
    if (place_is_here(b, host)) {
        struct result r = place_resolve(d, b, host);

        STATS_ADD(d->stats.faults_here, 1);
        /* It came, and could not be mapped at that time. */
        waiting_end(&d->waiting, b, host, 1, NULL);
        return r;
    }
    waiting_begin(&d->waiting, fault->thread, b, host);
    if (bitmap_test_and_set(&b->requested, host)) {
        STATS_ADD(d->stats.faults_known, 1);
    } else {
        /*
         * A broken connection is the load loop's to report; the request is
         * remembered in the bitmap.
         */
        (void)rpath_request(&d->rpath, b, host << b->host_bits, b->page_size);
        waiting_asked(&d->waiting, fault->thread);
    }
    /* It may have arrived since we looked: see place.h. */
    if (place_is_here(b, host)) {
        struct result r = place_resolve(d, b, host);

        waiting_end(&d->waiting, b, host, 1, NULL);
        return r;
    }
    return result_ok();
}

static struct result ask_block_again(struct destination *d,
                                     const struct ram_block *b)
{
    struct result r = result_ok();
    uint64_t host = bitmap_next_set(&b->requested, 0);

    while (RESULT_IS_OK(r) && host < b->requested.bits) {
        if (!place_is_here(b, host)) {
            r = rpath_request(&d->rpath, b, host << b->host_bits, b->page_size);
        }
        host = bitmap_next_set(&b->requested, host + 1);
    }
    return r;
}

struct result fault_ask_again(struct destination *d)
{
    struct result r = result_ok();

    for (uint32_t i = 0; RESULT_IS_OK(r) && i < d->ram->count; i++) {
        r = ask_block_again(d, &d->ram->blocks[i]);
    }
    return r;
}

static struct result answer_faults(struct destination *d, int stop_fd)
{
    for (;;) {
        struct uffd_fault faults[FAULTS];
        uint32_t count;
        struct result r = channel_poll(d->uffd, stop_fd, POLLIN, -1);

        if (RESULT_IS_OK(r)) {
            r = uffd_read(d->uffd, faults, FAULTS, &count);
        }
        for (uint32_t i = 0; RESULT_IS_OK(r) && i < count; i++) {
            r = handle_fault(d, &faults[i]);
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
}

struct result fault_run(struct destination *d, int stop_fd)
{
    struct result r;

    turn_take(TURN_URGENT);
    r = answer_faults(d, stop_fd);
    turn_take(TURN_USUAL);
    return r;
}
