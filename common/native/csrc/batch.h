/*
 * A batch: many page records, gathered for one system call.
 *
 * A record's head goes into `heads`, its page stays where it is in guest RAM;
 * `iov` strings them together. A batch belongs to one thread.
 *
 * Pages of a file that anybody may cut off are copied: read through a mapping,
 * what is no longer there kills the process, or is zero up to the end of its
 * page.
 */
#ifndef POSTCOPY_BATCH_H
#define POSTCOPY_BATCH_H

#include "wire.h"

#include <sys/uio.h>

/* Bounded by IOV_MAX: two iovecs a page. One 2 MiB host page fills it. */
#define BATCH_PAGES 512
_Static_assert(BATCH_PAGES >= HOST_PAGE_MAX / TARGET_PAGE_SIZE,
               "a host page is never split");

struct batch {
    struct iovec *iov;
    size_t iov_count;
    uint8_t *heads;
    size_t head_used;
    size_t head_open; /* start of the heads not yet in iov */
    uint32_t pages;
    uint32_t zeros;
    const struct ram_block *last;
    uint8_t *copies; /* one for each page; NULL: they stay where they are */
    const struct ram_block *copied; /* NULL, or the next record's copy is */
    uint64_t copied_page;           /* made, and is of this page */
};

/*
 * Where in a block there is data, so that holes are not read: reading one
 * through a mapping would allocate it. Found out chunk by chunk, for nearly
 * nothing; a walk over a whole block takes milliseconds.
 */
struct extent {
    const struct ram_block *block;
    uint64_t hole_start; /* [hole_start, hole_end) is a hole; bytes */
    uint64_t hole_end;
    uint64_t chunk; /* 1 + the one that `resident` is about */
    unsigned char resident[CHUNK_PAGES];
};

struct result batch_open(struct batch *b);
void batch_close(struct batch *b);
/* From now on pages are copied from their blocks' files. */
struct result batch_copy(struct batch *b);

/* Begin bare records, as on the preempt channel; `b->last` may be set then. */
void batch_reset(struct batch *b);
/* Begin a RAM section; its first record names its block. */
void batch_begin_part(struct batch *b, uint32_t section_id);

/*
 * Is a target page all zeroes as it is now, if it were to be added next?
 * `*hole`: so it is without being read. `e` as in batch_add_page(). What cannot
 * be read is not zero.
 */
bool batch_page_is_zero(struct batch *batch, struct extent *e,
                        const struct ram_block *b, uint64_t page, bool *hole);
/*
 * Add a target page as it is now. `*hole`: it was found to be zero without
 * reading it, it is a hole in the block's file. `e` NULL: the pages around it
 * are not going to be asked about. RESULT_HOST, and nothing is added, if a copy
 * cannot be made.
 */
struct result batch_add_page(struct batch *batch, struct extent *e,
                             const struct ram_block *b, uint64_t page,
                             bool *hole);

/* Ready to be written: after bare records, or after a section. */
void batch_end(struct batch *b);
void batch_end_part(struct batch *b, uint32_t section_id);
/* Behind a section, or alone: a mark of flow.h. */
void batch_add_mark(struct batch *b, uint32_t number);

/* Bytes on the wire. */
uint64_t batch_bytes(const struct batch *b);

#endif
