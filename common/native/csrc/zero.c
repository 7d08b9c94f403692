#include "zero.h"

#include "ram.h"

#include <string.h>

/*
 * Pages with data nearly always show it in their first words, so those are
 * looked at before the wide loop, which the compiler turns into vector ORs.
 * Memory may change while it is read (the guest runs in precopy): whatever is
 * found, the write that changed it is tracked and the page sent again.
 */
bool page_is_zero(const void *page)
{
    const uint64_t *words = page;
    const size_t count = TARGET_PAGE_SIZE / sizeof(uint64_t);
    const size_t stride = 64;

    if (words[0] | words[1] | words[count / 2] | words[count - 1]) {
        return false;
    }
    for (size_t i = 0; i < count; i += stride) {
        uint64_t any = 0;

        for (size_t j = 0; j < stride; j++) {
            any |= words[i + j];
        }
        if (any) {
            return false;
        }
    }
    return true;
}
