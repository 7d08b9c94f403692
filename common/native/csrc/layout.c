#include "layout.h"

#include "zero.h"

#include <sys/mman.h>

/* A full chunk may lack this many pages: 3 % more memory at the other end. */
#define LACKING 16
/* Memory that was touched and still is zero is not worth preparing. */
#define SAMPLES 8

static bool samples_hold_data(const uint8_t *chunk)
{
    for (unsigned i = 0; i < SAMPLES; i++) {
        if (page_is_zero(chunk + i * (CHUNK_SIZE / SAMPLES))) {
            return false;
        }
    }
    return true;
}

static enum chunk_kind touched_kind(struct ram_block *b, uint64_t chunk)
{
    uint8_t *at = b->map + (chunk << CHUNK_BITS);
    unsigned char resident[CHUNK_PAGES];
    uint64_t lacking = 0;

    if ((chunk + 1) << CHUNK_BITS > b->length || block_is_huge(b) ||
        mincore(at, CHUNK_SIZE, resident) < 0) {
        return CHUNK_MIXED;
    }
    for (unsigned i = 0; i < CHUNK_PAGES; i++) {
        lacking += !(resident[i] & 1);
    }
    if (!lacking) {
        bitmap_test_and_set(&b->solid, chunk);
    }
    /* Only now: reading a hole would allocate it. */
    for (unsigned i = 0; i < SAMPLES; i++) {
        lacking += resident[i * (CHUNK_PAGES / SAMPLES)] & 1 ? 0 : CHUNK_PAGES;
    }
    return lacking <= LACKING && samples_hold_data(at) ? CHUNK_FULL :
                                                         CHUNK_MIXED;
}

void layout_look(struct ram_block *b, uint64_t first, uint8_t *kinds,
                 uint64_t count)
{
    uint64_t data = ram_next_data(b, first << CHUNK_BITS);

    for (uint64_t i = 0; i < count; i++) {
        uint64_t start = (first + i) << CHUNK_BITS;
        uint64_t end = start + CHUNK_SIZE;

        if (data < start) {
            data = ram_next_data(b, start);
        }
        if (data >= (end < b->length ? end : b->length)) {
            kinds[i] = CHUNK_EMPTY;
        } else {
            kinds[i] = (uint8_t)touched_kind(b, first + i);
        }
    }
}

void layout_skip_empty(struct ram_block *b, uint64_t first,
                       const uint8_t *kinds, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        if (kinds[i] == CHUNK_EMPTY) {
            bitmap_clear_range(&b->dirty, (first + i) << CHUNK_PAGES_BITS,
                               block_chunk_pages(b, first + i));
        }
    }
}
