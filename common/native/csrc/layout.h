/*
 * What the source's RAM looks like, chunk by chunk, without reading it.
 *
 * Never-touched memory is found by its holes and is not sent at all to a
 * destination that understands this; see prepare.h for the rest.
 */
#ifndef POSTCOPY_LAYOUT_H
#define POSTCOPY_LAYOUT_H

#include "ram.h"

enum chunk_kind {
    CHUNK_MIXED, /* nothing is promised: each page is sent */
    CHUNK_EMPTY, /* nothing is sent: it reads as zero */
    CHUNK_FULL,  /* nearly every page will be sent, with data */
};

/*
 * The kinds of the chunks [first, first + count), one in a byte of `kinds`.
 * Notes which have no hole: what the guest gives back later is not missed, only
 * read.
 */
void layout_look(struct ram_block *b, uint64_t first, uint8_t *kinds,
                 uint64_t count);
/*
 * The destination was told: what is empty needs no sending. A page written
 * since then is dirty again after the next sync.
 */
void layout_skip_empty(struct ram_block *b, uint64_t first,
                       const uint8_t *kinds, uint64_t count);

#endif
