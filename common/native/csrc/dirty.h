/*
 * Dirty tracking: which pages did the guest write since we last asked?
 *
 * Primary way (Linux 6.7): the guest's RAM is registered for asynchronous
 * write protection, PAGEMAP_SCAN reports what was written and protects it again
 * in the same step. It costs nothing for memory nobody touches, needs no thread
 * and no event, and sees every write through the guest process's mapping, by
 * vCPUs too. It does not see writes through other mappings of the memfd.
 *
 * Where the kernel or the guest offers no way to know, every page counts as
 * dirty in every pass (DIRTY_UNKNOWN): right, but precopy never gets small.
 * RAM that nobody writes (no CPUs) needs no tracking (DIRTY_NEVER).
 */
#ifndef POSTCOPY_DIRTY_H
#define POSTCOPY_DIRTY_H

#include "ram.h"

enum dirty_way { DIRTY_NEVER, DIRTY_UNKNOWN, DIRTY_WP_ASYNC };

struct dirty {
    struct ram *ram;
    int32_t way; /* enum dirty_way */
    int uffd;    /* negotiated with UFFD_CAN_WP_ASYNC */
    int pagemap; /* of the guest's process */
};

/* Every page becomes dirty, and from here on every write is seen. */
struct result dirty_start(struct dirty *d);
/*
 * Add what was written since the last call to the blocks' dirty bitmaps;
 * `*pages` is how many target pages that were.
 */
struct result dirty_sync(struct dirty *d, uint64_t *pages);
/*
 * The same once the guest has stopped: it has to wait for this, so nobody looks
 * where everything is dirty anyway, and `*pages` does not count it.
 */
struct result dirty_sync_last(struct dirty *d, uint64_t *pages);
struct result dirty_stop(struct dirty *d);

#endif
