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
 * The words live in memory of their own, or in a file that outlives this
 * process: then whoever comes after us finds every bit that was set.
 */
#ifndef POSTCOPY_BITMAP_H
#define POSTCOPY_BITMAP_H

#include "error.h"

/* Whole pages, so that the bitmaps of one file can be mapped one by one. */
#define BITMAP_ALIGN UINT64_C(4096)

struct bitmap {
    uint64_t *words;
    uint64_t bits;
};

/* All bits clear. */
struct result bitmap_open(struct bitmap *b, uint64_t bits);
/*
 * The bits that a file holds from `offset` on, a multiple of BITMAP_ALIGN; the
 * file must be long enough for bitmap_length() bytes.
 */
struct result bitmap_open_file(struct bitmap *b, uint64_t bits, int fd,
                               uint64_t offset);
/* The same, to read: who writes them is another process. Bits past `bits` may
 * be anything. */
struct result bitmap_view_file(struct bitmap *b, uint64_t bits, int fd,
                               uint64_t offset);
void bitmap_close(struct bitmap *b);
/* Bytes in a file, a multiple of BITMAP_ALIGN. */
uint64_t bitmap_length(uint64_t bits);

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
