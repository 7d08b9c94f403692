#include "bitmap.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#define WORD_BITS 64u

static uint64_t word_count(uint64_t bits)
{
    return (bits + WORD_BITS - 1) / WORD_BITS;
}

uint64_t bitmap_length(uint64_t bits)
{
    uint64_t words = word_count(bits);
    uint64_t bytes = (words ? words : 1) * sizeof(uint64_t);

    return (bytes + BITMAP_ALIGN - 1) / BITMAP_ALIGN * BITMAP_ALIGN;
}

static struct result map_words(struct bitmap *b, uint64_t bits, int protection,
                               int flags, int fd, uint64_t offset)
{
    void *words = mmap(NULL, (size_t)bitmap_length(bits), protection, flags, fd,
                       (off_t)offset);

    if (words == MAP_FAILED) {
        return result_errno(RESULT_HOST, "mmap of a bitmap", errno);
    }
    *b = (struct bitmap){ .words = words, .bits = bits };
    return result_ok();
}

struct result bitmap_open(struct bitmap *b, uint64_t bits)
{
    return map_words(b, bits, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

struct result bitmap_open_file(struct bitmap *b, uint64_t bits, int fd,
                               uint64_t offset)
{
    struct result r =
        map_words(b, bits, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

    /* Who kept the file may have changed it; we count on these being clear. */
    if (RESULT_IS_OK(r) && bits % WORD_BITS) {
        b->words[bits / WORD_BITS] &= ~(UINT64_MAX << (bits % WORD_BITS));
    }
    return r;
}

struct result bitmap_view_file(struct bitmap *b, uint64_t bits, int fd,
                               uint64_t offset)
{
    return map_words(b, bits, PROT_READ, MAP_SHARED, fd, offset);
}

void bitmap_close(struct bitmap *b)
{
    if (b->words) {
        munmap(b->words, (size_t)bitmap_length(b->bits));
    }
    *b = (struct bitmap){ 0 };
}

static uint64_t load_word(const struct bitmap *b, uint64_t word)
{
    return __atomic_load_n(&b->words[word], __ATOMIC_SEQ_CST);
}

bool bitmap_test(const struct bitmap *b, uint64_t bit)
{
    return load_word(b, bit / WORD_BITS) >> (bit % WORD_BITS) & 1;
}

bool bitmap_test_and_set(struct bitmap *b, uint64_t bit)
{
    uint64_t mask = UINT64_C(1) << (bit % WORD_BITS);

    return __atomic_fetch_or(&b->words[bit / WORD_BITS], mask,
                             __ATOMIC_SEQ_CST) &
           mask;
}

bool bitmap_test_and_clear(struct bitmap *b, uint64_t bit)
{
    uint64_t mask = UINT64_C(1) << (bit % WORD_BITS);

    return __atomic_fetch_and(&b->words[bit / WORD_BITS], ~mask,
                              __ATOMIC_SEQ_CST) &
           mask;
}

/* The bits of [first, end) that lie in word `word`. */
static uint64_t range_mask(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t mask = UINT64_MAX;

    if (word == first / WORD_BITS) {
        mask &= UINT64_MAX << (first % WORD_BITS);
    }
    if (word == (end - 1) / WORD_BITS) {
        mask &= UINT64_MAX >> (WORD_BITS - 1 - (end - 1) % WORD_BITS);
    }
    return mask;
}

void bitmap_set_range(struct bitmap *b, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;

    if (count == 0) {
        return;
    }
    for (uint64_t w = first / WORD_BITS; w <= (end - 1) / WORD_BITS; w++) {
        __atomic_fetch_or(&b->words[w], range_mask(w, first, end),
                          __ATOMIC_SEQ_CST);
    }
}

void bitmap_clear_range(struct bitmap *b, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;

    if (count == 0) {
        return;
    }
    for (uint64_t w = first / WORD_BITS; w <= (end - 1) / WORD_BITS; w++) {
        __atomic_fetch_and(&b->words[w], ~range_mask(w, first, end),
                           __ATOMIC_SEQ_CST);
    }
}

void bitmap_copy(struct bitmap *b, const struct bitmap *from)
{
    for (uint64_t w = 0; w < word_count(b->bits); w++) {
        __atomic_store_n(&b->words[w], load_word(from, w), __ATOMIC_SEQ_CST);
    }
}

/* `flip` is 0 to look for a set bit, all ones to look for a clear one. */
static uint64_t next_bit(const struct bitmap *b, uint64_t from, uint64_t flip)
{
    if (from >= b->bits) {
        return b->bits;
    }
    for (uint64_t w = from / WORD_BITS; w < word_count(b->bits); w++) {
        uint64_t word = load_word(b, w) ^ flip;

        if (w == from / WORD_BITS) {
            word &= UINT64_MAX << (from % WORD_BITS);
        }
        if (word) {
            uint64_t bit = w * WORD_BITS + (uint64_t)__builtin_ctzll(word);

            return bit < b->bits ? bit : b->bits;
        }
    }
    return b->bits;
}

uint64_t bitmap_next_set(const struct bitmap *b, uint64_t from)
{
    return next_bit(b, from, 0);
}

uint64_t bitmap_next_clear(const struct bitmap *b, uint64_t from)
{
    return next_bit(b, from, UINT64_MAX);
}

bool bitmap_all_set(const struct bitmap *b, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;

    for (uint64_t w = first / WORD_BITS; count && w <= (end - 1) / WORD_BITS;
         w++) {
        uint64_t mask = range_mask(w, first, end);

        if ((load_word(b, w) & mask) != mask) {
            return false;
        }
    }
    return true;
}

uint64_t bitmap_count(const struct bitmap *b)
{
    uint64_t count = 0;

    for (uint64_t w = 0; w < word_count(b->bits); w++) {
        count += (uint64_t)__builtin_popcountll(load_word(b, w));
    }
    return count;
}
