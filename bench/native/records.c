#include "records.h"

size_t records_lay_out(struct records *r, uint64_t first, uint8_t *bytes,
                       size_t count)
{
    for (size_t i = 0; i < count; i++) {
        r->heads[i] = first + i;
        r->parts[2 * i] = (struct iovec){ &r->heads[i], sizeof(r->heads[i]) };
        r->parts[2 * i + 1] =
            (struct iovec){ bytes + i * SMALL_PAGE, SMALL_PAGE };
    }
    return 2 * count;
}

bool records_are(const struct records *r, uint64_t first, size_t count,
                 struct fail *why)
{
    for (size_t i = 0; i < count; i++) {
        if (r->heads[i] != first + i)
            return fail(why, "page %llu came instead of %llu",
                        (unsigned long long)r->heads[i],
                        (unsigned long long)(first + i));
    }
    return true;
}
