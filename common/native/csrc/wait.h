/*
 * Who waits for which page, and for how long.
 *
 * A guest thread that faulted on a page that is not here is a waiter from the
 * moment its fault was read until the page was placed. From the waiters come
 * QEMU's blocktime figures: per vCPU, the time it waited; for the guest, the
 * time in which every vCPU waited.
 *
 * A wait that ended with the page that was asked for has parts, each measured
 * by itself: `request` until the request was written, `reply` until the page
 * came (the network both ways and the source), `place` until its bytes were
 * where they belong, `wake` until the guest had it mapped and was told.
 */
#ifndef POSTCOPY_WAIT_H
#define POSTCOPY_WAIT_H

#include "ram.h"
#include "stats.h"

#include <pthread.h>

#define VCPUS_MAX 256
#define WAITERS_MAX 512 /* faults of more threads at once go unmeasured */

struct vcpu_wait {
    uint32_t thread; /* thread id, as userfaultfd reports it */
    uint32_t blocked;
    uint64_t blocked_ns; /* time in which it waited */
    uint64_t faults;     /* waits that ended */
};

struct waiter {
    const struct ram_block *block;
    uint64_t host;
    uint64_t since_ns;
    uint64_t asked_ns; /* its request was written; 0: another's was, or none */
    uint32_t thread;
    int32_t vcpu; /* index, -1: some other thread of the guest's process */
};

/* When a page came and when its bytes were in place; 0: not looked at. */
struct arrival {
    uint64_t came_ns;
    uint64_t filled_ns;
};

struct waiting {
    pthread_mutex_t mutex; /* protects all but the atomics below */
    struct waiter waiters[WAITERS_MAX];
    uint32_t count; /* atomic; changed under the mutex */
    struct vcpu_wait vcpus[VCPUS_MAX];
    uint32_t vcpu_count;
    uint32_t vcpus_blocked;
    uint64_t all_blocked_since_ns;
    uint64_t all_blocked_ns; /* time in which every vCPU waited */
    uint64_t other_ns;       /* waits of threads that are no vCPUs */
    uint64_t other_faults;
    struct histogram latency; /* of every wait that ended */
    struct histogram request; /* its parts, see above */
    struct histogram reply;
    struct histogram place;
    struct histogram wake;
};

void waiting_open(struct waiting *w, const uint32_t *threads, uint32_t count);
void waiting_close(struct waiting *w);

/* A fault on a page that is not here; one already known is not counted. */
void waiting_begin(struct waiting *w, uint32_t thread,
                   const struct ram_block *block, uint64_t host);
/* The request for the page that this thread waits for has left. */
void waiting_asked(struct waiting *w, uint32_t thread);
/* Host pages [first, first + count) are placed; `at` NULL: nobody looked. */
void waiting_end(struct waiting *w, const struct ram_block *block,
                 uint64_t first, uint64_t count, const struct arrival *at);

static inline bool waiting_any(const struct waiting *w)
{
    return __atomic_load_n(&w->count, __ATOMIC_SEQ_CST);
}

#endif
