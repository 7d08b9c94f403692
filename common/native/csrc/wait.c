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

/* The event of one fault is repeated after a signal or an early wake. */
static bool known_locked(const struct waiting *w, uint32_t thread)
{
    for (uint32_t i = 0; i < w->count; i++) {
        if (w->waiters[i].thread == thread) {
            return true;
        }
    }
    return false;
}

void waiting_begin(struct waiting *w, uint32_t thread,
                   const struct ram_block *block, uint64_t host)
{
    pthread_mutex_lock(&w->mutex);
    if (w->count < WAITERS_MAX && !known_locked(w, thread)) {
        uint64_t now = clock_ns();
        int32_t vcpu = find_vcpu(w, thread);

        w->waiters[w->count] = (struct waiter){
            .block = block, .host = host, .since_ns = now,
            .thread = thread, .vcpu = vcpu,
        };
        __atomic_store_n(&w->count, w->count + 1, __ATOMIC_SEQ_CST);
        block_vcpu_locked(w, vcpu, now);
    }
    pthread_mutex_unlock(&w->mutex);
}

void waiting_end(struct waiting *w, const struct ram_block *block,
                 uint64_t first, uint64_t count)
{
    /* The common case in the background stream; a waiter that comes just
       now looks at the received bitmap after it was entered. */
    if (!__atomic_load_n(&w->count, __ATOMIC_SEQ_CST)) {
        return;
    }
    pthread_mutex_lock(&w->mutex);
    for (uint32_t i = 0; i < w->count;) {
        struct waiter *who = &w->waiters[i];

        if (who->block == block && who->host - first < count) {
            uint64_t now = clock_ns();

            histogram_add(&w->latency, now - who->since_ns);
            release_vcpu_locked(w, who, now);
            *who = w->waiters[w->count - 1];
            __atomic_store_n(&w->count, w->count - 1, __ATOMIC_SEQ_CST);
        } else {
            i++;
        }
    }
    pthread_mutex_unlock(&w->mutex);
}
