#include "stats.h"

#include <stddef.h>

/* Values below HISTOGRAM_SPLIT have a bucket each. */
static size_t bucket_of(uint64_t ns)
{
    unsigned log;

    if (ns < HISTOGRAM_SPLIT) {
        return (size_t)ns;
    }
    log = 63 - (unsigned)__builtin_clzll(ns);
    return (size_t)(log - 3) * HISTOGRAM_SPLIT +
           (size_t)(ns >> (log - 4) & (HISTOGRAM_SPLIT - 1));
}

static uint64_t lower_edge(size_t bucket)
{
    unsigned log;

    if (bucket < HISTOGRAM_SPLIT) {
        return bucket;
    }
    log = (unsigned)(bucket / HISTOGRAM_SPLIT) + 3;
    return (HISTOGRAM_SPLIT + bucket % HISTOGRAM_SPLIT) << (log - 4);
}

void histogram_add(struct histogram *h, uint64_t ns)
{
    uint64_t max = STATS_READ(h->max_ns);

    STATS_ADD(h->count, 1);
    STATS_ADD(h->sum_ns, ns);
    STATS_ADD(h->bucket[bucket_of(ns)], 1);
    while (ns > max &&
           !__atomic_compare_exchange_n(&h->max_ns, &max, ns, 1,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

uint64_t histogram_percentile(const struct histogram *h, unsigned permille)
{
    uint64_t total = 0;
    uint64_t seen = 0;
    uint64_t wanted;

    for (size_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        total += STATS_READ(h->bucket[i]);
    }
    if (total == 0) {
        return 0;
    }
    wanted = (total * permille + 999) / 1000;
    for (size_t i = 0; i < HISTOGRAM_BUCKETS - 1; i++) {
        seen += STATS_READ(h->bucket[i]);
        if (seen >= wanted && seen) {
            uint64_t edge = lower_edge(i + 1);
            uint64_t max = STATS_READ(h->max_ns);

            return edge < max ? edge : max;
        }
    }
    return STATS_READ(h->max_ns);
}

uint64_t histogram_between_us(const struct histogram *h, uint64_t low_us,
                              uint64_t high_us)
{
    uint64_t count = 0;

    for (size_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        uint64_t us = lower_edge(i) / 1000;

        if (us >= low_us && us < high_us) {
            count += STATS_READ(h->bucket[i]);
        }
    }
    return count;
}
