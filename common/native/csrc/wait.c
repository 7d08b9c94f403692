#include "wait.h"

#include "limit.h"

#include <string.h>

void waiting_open(struct waiting *w, const uint32_t *threads, uint32_t count)
{
    memset(w, 0, sizeof(*w));
    pthread_mutex_init(&w->mutex, NULL);
    w->vcpu_count = count < VCPUS_MAX ? count : VCPUS_MAX;
    for (uint32_t i = 0; i < w->vcpu_count; i++) {
        w->vcpus[i].thread = threads[i];
    }
}

void waiting_close(struct waiting *w)
{
    pthread_mutex_destroy(&w->mutex);
}

static int32_t find_vcpu(const struct waiting *w, uint32_t thread)
{
    for (uint32_t i = 0; i < w->vcpu_count; i++) {
        if (w->vcpus[i].thread == thread) {
            return (int32_t)i;
        }
    }
    return -1;
}

static void block_vcpu_locked(struct waiting *w, int32_t vcpu, uint64_t now)
{
    if (vcpu < 0 || w->vcpus[vcpu].blocked) {
        return;
    }
    w->vcpus[vcpu].blocked = 1;
    if (++w->vcpus_blocked == w->vcpu_count) {
        w->all_blocked_since_ns = now;
    }
}

static void release_vcpu_locked(struct waiting *w, const struct waiter *who,
                                uint64_t now)
{
    uint64_t waited = now - who->since_ns;

    if (who->vcpu < 0) {
        STATS_ADD(w->other_ns, waited);
        STATS_ADD(w->other_faults, 1);
        return;
    }
    STATS_ADD(w->vcpus[who->vcpu].blocked_ns, waited);
    STATS_ADD(w->vcpus[who->vcpu].faults, 1);
    if (w->vcpus_blocked == w->vcpu_count) {
        STATS_ADD(w->all_blocked_ns, now - w->all_blocked_since_ns);
    }
    w->vcpus[who->vcpu].blocked = 0;
    w->vcpus_blocked--;
}

/* Index of the thread's entry, `count` if it has none. */
static uint32_t find_waiter_locked(const struct waiting *w, uint32_t thread)
{
    uint32_t i = 0;

    while (i < w->count && w->waiters[i].thread != thread) {
        i++;
    }
    return i;
}

static void count_parts_locked(struct waiting *w, const struct waiter *who,
                               const struct arrival *at, uint64_t now)
{
    if (!at || !who->asked_ns || at->came_ns < who->asked_ns ||
        !at->filled_ns) {
        return;
    }
    histogram_add(&w->request, who->asked_ns - who->since_ns);
    histogram_add(&w->reply, at->came_ns - who->asked_ns);
    histogram_add(&w->place, at->filled_ns - at->came_ns);
    histogram_add(&w->wake, now - at->filled_ns);
}

static void end_wait_locked(struct waiting *w, uint32_t i, uint64_t now)
{
    struct waiter *who = &w->waiters[i];

    histogram_add(&w->latency, now - who->since_ns);
    release_vcpu_locked(w, who, now);
    *who = w->waiters[w->count - 1];
    __atomic_store_n(&w->count, w->count - 1, __ATOMIC_SEQ_CST);
}

static void begin_wait_locked(struct waiting *w, const struct waiter *who)
{
    if (w->count < WAITERS_MAX) {
        w->waiters[w->count] = *who;
        __atomic_store_n(&w->count, w->count + 1, __ATOMIC_SEQ_CST);
        block_vcpu_locked(w, who->vcpu, who->since_ns);
    }
}

void waiting_begin(struct waiting *w, uint32_t thread,
                   const struct ram_block *block, uint64_t host)
{
    struct waiter who = { .block = block, .host = host, .thread = thread };
    uint32_t i;

    pthread_mutex_lock(&w->mutex);
    who.since_ns = clock_ns();
    who.vcpu = find_vcpu(w, thread);
    i = find_waiter_locked(w, thread);
    if (i == w->count) {
        begin_wait_locked(w, &who);
    } else if (w->waiters[i].block != block || w->waiters[i].host != host) {
        /* Its page woke it and waiting_end() is still to come for that. */
        end_wait_locked(w, i, who.since_ns);
        begin_wait_locked(w, &who);
    }
    /* Else: a signal or an early wake repeats the event of one fault. */
    pthread_mutex_unlock(&w->mutex);
}

void waiting_asked(struct waiting *w, uint32_t thread)
{
    uint32_t i;

    pthread_mutex_lock(&w->mutex);
    i = find_waiter_locked(w, thread);
    if (i < w->count) {
        w->waiters[i].asked_ns = clock_ns();
    }
    pthread_mutex_unlock(&w->mutex);
}

void waiting_end(struct waiting *w, const struct ram_block *block,
                 uint64_t first, uint64_t count, const struct arrival *at)
{
    /* The common case in the background stream; a waiter that comes just
       now looks at the received bitmap after it was entered. */
    if (!waiting_any(w)) {
        return;
    }
    pthread_mutex_lock(&w->mutex);
    for (uint32_t i = 0; i < w->count;) {
        const struct waiter *who = &w->waiters[i];

        if (who->block == block && who->host - first < count) {
            uint64_t now = clock_ns();

            count_parts_locked(w, who, at, now);
            end_wait_locked(w, i, now);
        } else {
            i++;
        }
    }
    pthread_mutex_unlock(&w->mutex);
}
