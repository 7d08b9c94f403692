/*
 * Counters and histograms: written by the loops, read by Python without locks.
 *
 * All fields are changed with relaxed atomic adds; a reader may see one
 * counter a moment ahead of another.
 */
#ifndef POSTCOPY_STATS_H
#define POSTCOPY_STATS_H

#include <stdint.h>

#define STATS_ADD(field, n) \
    __atomic_fetch_add(&(field), (uint64_t)(n), __ATOMIC_RELAXED)
#define STATS_READ(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)

/*
 * A histogram of durations. A power of two is split into 16 buckets, so a
 * percentile read from it is at most 1/16 too high.
 */
#define HISTOGRAM_SPLIT 16
#define HISTOGRAM_BUCKETS (61 * HISTOGRAM_SPLIT) /* the last ends at 2^64 */

struct histogram {
    uint64_t count;
    uint64_t sum_ns;
    uint64_t max_ns;
    uint64_t bucket[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *h, uint64_t ns);
/* Upper edge, in ns, of the bucket that holds the `permille`-th value. */
uint64_t histogram_percentile(const struct histogram *h, unsigned permille);
/* How many values lie in [low_us, high_us), by the lower edges of buckets. */
uint64_t histogram_between_us(const struct histogram *h, uint64_t low_us,
                              uint64_t high_us);

#endif
