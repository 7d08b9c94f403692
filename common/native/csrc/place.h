/*
 * How a page gets into the guest; the ways are described in destination.h.
 *
 * Who places, requests, wakes. The fault loop sets a page's `requested` bit and
 * then looks at `received`; a load loop sets `received` and then looks at
 * `requested`. Both are sequentially consistent, so at least one of them sees
 * the other and resolves the fault; both doing so is harmless.
 *
 * `claimed` makes a page that arrives twice harmless: the second is dropped,
 * the guest may have written to the first already.
 */
#ifndef POSTCOPY_PLACE_H
#define POSTCOPY_PLACE_H

#include "destination.h"

#include <sys/uio.h>

/* Target pages with their data, before `listening`: contiguous, one chunk. */
struct result place_early(struct destination *d, struct ram_block *b,
                          uint64_t page, struct iovec *iov, uint32_t count);
struct result place_early_zero(struct destination *d, struct ram_block *b,
                               uint64_t page);

/* True if this host page is the caller's to fill. */
bool place_claim(struct destination *d, struct ram_block *b, uint64_t host);
/* Claimed ordinary pages with their data: contiguous, one chunk. */
struct result place_pages(struct destination *d, struct ram_block *b,
                          uint64_t host, struct iovec *iov, uint32_t count);
/* A claimed host page of zeroes. */
struct result place_zero(struct destination *d, struct ram_block *b,
                         uint64_t host);
/* A claimed huge page that was assembled at `data`. */
struct result place_huge(struct destination *d, struct ram_block *b,
                         uint64_t host, const uint8_t *data);
/* Where to assemble a huge page: in place if that is safe, else `scratch`. */
uint8_t *place_huge_at(struct destination *d, struct ram_block *b,
                       uint64_t host, uint8_t *scratch);

/* A fault on a page that is here: make it visible, with its neighbours. */
struct result place_resolve(struct destination *d, struct ram_block *b,
                            uint64_t host);

/*
 * Map everything that arrived in precopy into the guest, so that it does not
 * fault on it. Ends early when stop_fd is readable.
 */
struct result place_sweep(struct destination *d, int stop_fd);

static inline bool place_is_here(const struct ram_block *b, uint64_t host)
{
    /* From destination_listen() on a host page's bits are all equal. */
    return bitmap_test(&b->received, host << block_pages_bits(b));
}

#endif
