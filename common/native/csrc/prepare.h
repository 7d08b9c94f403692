/*
 * Memory made ready before its pages arrive.
 *
 * Allocating a page when it is received costs more than receiving it. A source
 * that knows says beforehand, by chunks of 2 MiB, what its RAM looks like;
 * where it holds data throughout, a chunk is allocated as one huge page, which
 * costs a quarter of 512 small ones, and its pages are then copied into our
 * mapping.
 *
 * A chunk cannot be made one huge page any more once the guest's mapping is
 * registered with a userfaultfd and the chunk has holes, so all of this ends
 * before destination_listen().
 */
#ifndef POSTCOPY_PREPARE_H
#define POSTCOPY_PREPARE_H

#include "destination.h"
#include "layout.h"

/*
 * What the source says of the chunks [first, first + count) of a block, one
 * enum chunk_kind in a byte. Only before destination_listen().
 */
struct result prepare_expect_untrusted(struct destination *d,
                                       struct ram_block *b, uint64_t first,
                                       const uint8_t *kinds, uint64_t count);

/* Allocate what is expected; ends early when stop_fd is readable. */
struct result prepare_run(struct destination *d, int stop_fd);

/* Can this host page be written through our mapping of the block? */
static inline bool prepared_at(const struct ram_block *b, uint64_t host)
{
    return block_is_huge(b) ||
           bitmap_test(&b->prepared, host >> (CHUNK_BITS - TARGET_PAGE_BITS));
}

#endif
