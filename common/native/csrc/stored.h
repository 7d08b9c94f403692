/*
 * RAM that comes from a store: what its source does differently.
 *
 * Before the first page of a region is looked at, the region is compared with
 * its checksum: a page that is not what was stored is never sent. The file is
 * read, not mapped: whoever cuts it off ends the migration, and no more.
 *
 * A destination may have no need of pages of zeroes: where nothing was sent it
 * finds zeroes anyway. Then the pump leaves them out. Their bits in `owed` stay
 * set, so that a request for one is answered like any other, and the pump
 * writes down in `left_out` that it has been there.
 */
#ifndef POSTCOPY_STORED_H
#define POSTCOPY_STORED_H

#include "checksum.h"
#include "ram.h"
#include "working_set.h"

struct stored_block {
    struct checksums checksums; /* of no use without `compared` */
    struct bitmap left_out;     /* host pages; set by the pump alone */
};

struct stored {
    struct ram *ram;
    struct stored_block *blocks; /* as many as the table has */
    bool compared;               /* there are checksums */
    bool leave_out_zeroes;       /* fixed once loops run */
    uint64_t damage;             /* atomic: 0, or see stored_damage() */
    struct working_set working_set;
};

/*
 * `checksums`: of all blocks' regions, block after block, the caller's; NULL:
 * there are none. What was opened is closed by stored_close() in any case.
 */
struct result stored_open(struct stored *st, struct ram *ram,
                          const uint32_t *checksums);
void stored_close(struct stored *st);
/* A new epoch: all that is owed is looked at again, from the first page on. */
void stored_restart(struct stored *st);

/* Compare what [offset, offset + length) of a block touches. Any thread. */
struct result stored_check(struct stored *st, const struct ram_block *b,
                           uint64_t offset, uint64_t length);
/* [offset, ...) of a block cannot be read, or is not what was stored. */
void stored_damaged(struct stored *st, const struct ram_block *b,
                    uint64_t offset);
/* True, with the region's place, if that was found of any. */
bool stored_damage(const struct stored *st, uint32_t *block, uint64_t *offset);
/* How many regions were compared and found right. */
uint64_t stored_verified(const struct stored *st);

static inline struct bitmap *stored_left_out(const struct stored *st,
                                             const struct ram_block *b)
{
    return &st->blocks[b - st->ram->blocks].left_out;
}

#endif
