/*
 * A bandwidth limit: a bucket that fills at `rate` bytes per second.
 *
 * One thread takes; any thread may change the rate at any time.
 */
#ifndef POSTCOPY_LIMIT_H
#define POSTCOPY_LIMIT_H

#include "error.h"

struct limit {
    uint64_t rate;    /* bytes per second, 0 is unlimited; atomic */
    int64_t credit;   /* bytes that may be sent now; negative is debt */
    uint64_t last_ns; /* when credit was last brought up to date */
};

void limit_set(struct limit *l, uint64_t rate);
/* Account for `bytes` that are sent now; may go into debt. */
void limit_take(struct limit *l, uint64_t bytes);
/* How long to wait until the debt is paid, in ns, at most LIMIT_NAP_NS. */
#define LIMIT_NAP_NS UINT64_C(100000000)
uint64_t limit_wait_ns(struct limit *l);

uint64_t clock_ns(void);

#endif
