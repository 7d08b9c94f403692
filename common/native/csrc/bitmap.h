/*
 * Bitmaps that several threads change at once.
 *
 * Every operation on a single bit is atomic and sequentially consistent: the
 * fault loop and the load loops decide by them who places, requests and wakes
 * (see place.h), and each relies on seeing the other's store.
 *
 * Bit i is bit i % 64 of word i / 64, which on a little-endian machine is also
 * the order of the received bitmap on the wire. Bits past `bits` stay 0.
 *
 * The words live in a memfd, so that a bitmap can be handed to the guest's
 * process, which keeps it while the daemon is restarted.
 */
#ifndef POSTCOPY_BITMAP_H
#define POSTCOPY_BITMAP_H

#include "error.h"

struct bitmap {
    uint64_t *words;
    uint64_t bits;
    int fd;
};

struct result bitmap_open(struct bitmap *b, uint64_t bits);
void bitmap_close(struct bitmap *b);

bool bitmap_test(const struct bitmap *b, uint64_t bit);
bool bitmap_test_and_set(struct bitmap *b, uint64_t bit);
bool bitmap_test_and_clear(struct bitmap *b, uint64_t bit);

/* Ranges: [first, first + count). Atomic word by word, not as a whole. */
void bitmap_set_range(struct bitmap *b, uint64_t first, uint64_t count);
void bitmap_clear_range(struct bitmap *b, uint64_t first, uint64_t count);

/* The same bits as `from`, which has as many. Atomic word by word. */
void bitmap_copy(struct bitmap *b, const struct bitmap *from);

/* First bit at or after `from` that is set (clear); `bits` if there is none. */
uint64_t bitmap_next_set(const struct bitmap *b, uint64_t from);
uint64_t bitmap_next_clear(const struct bitmap *b, uint64_t from);

/* Are all bits of [first, first + count) set? Looks no further than that. */
bool bitmap_all_set(const struct bitmap *b, uint64_t first, uint64_t count);

uint64_t bitmap_count(const struct bitmap *b);

#endif
