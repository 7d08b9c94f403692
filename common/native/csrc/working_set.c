#include "working_set.h"

#define HOST_MASK ((UINT64_C(1) << 48) - 1)

bool working_set_add_untrusted(struct working_set *w, const struct ram *ram,
                               uint64_t page)
{
    uint64_t block = page >> 48;

    if (w->first_count == WORKING_SET_MAX || block >= ram->count ||
        (page & HOST_MASK) >= block_hosts(&ram->blocks[block])) {
        return false;
    }
    w->first[w->first_count++] = page;
    return true;
}

void working_set_note(struct working_set *w, uint64_t page)
{
    uint32_t count = __atomic_load_n(&w->asked_count, __ATOMIC_RELAXED);

    if (count < WORKING_SET_MAX) {
        w->asked[count] = page;
        __atomic_store_n(&w->asked_count, count + 1, __ATOMIC_RELEASE);
    }
}

bool working_set_next(struct working_set *w, struct ram *ram,
                      struct ram_block **block, uint64_t *host)
{
    for (; w->first_next < w->first_count; w->first_next++) {
        uint64_t page = w->first[w->first_next];

        *block = &ram->blocks[page >> 48];
        *host = page & HOST_MASK;
        if (bitmap_test(&(*block)->owed, *host)) {
            return true;
        }
    }
    return false;
}
