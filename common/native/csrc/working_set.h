/*
 * The pages that a guest asks for first, once it runs on stored RAM.
 *
 * A guest that is restored twice from the same store asks for nearly the same
 * pages in nearly the same order. So requests are written down, in order and
 * up to a bound, and what was written down is sent first the next time.
 *
 * A page is block << 48 | host page, with the block's place in the table.
 */
#ifndef POSTCOPY_WORKING_SET_H
#define POSTCOPY_WORKING_SET_H

#include "ram.h"

#define WORKING_SET_MAX 65536

struct working_set {
    uint64_t asked[WORKING_SET_MAX]; /* the oldest request first */
    uint32_t asked_count;            /* atomic; the request server's */
    uint64_t first[WORKING_SET_MAX]; /* to be sent first, in this order */
    uint32_t first_count;            /* fixed once loops run */
    uint32_t first_next;             /* pump only */
};

static inline uint64_t working_set_page(uint64_t block, uint64_t host)
{
    return block << 48 | host;
}

/*
 * Send this page among the first. False if there is no such page, or no room.
 * No loop may run.
 */
bool working_set_add_untrusted(struct working_set *w, const struct ram *ram,
                               uint64_t page);
/* A request came for a page that was still owed. */
void working_set_note(struct working_set *w, uint64_t page);
/*
 * The next of the first pages that is still owed, without taking it; false
 * when there is none left.
 */
bool working_set_next(struct working_set *w, struct ram *ram,
                      struct ram_block **block, uint64_t *host);
/* Whether the first pages may have such a next one; pump only. */
static inline bool working_set_is_left(const struct working_set *w)
{
    return w->first_next < w->first_count;
}

#endif
