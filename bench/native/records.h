/*
 * The pages of the measured stream: 8 bytes that name a page, then its bytes,
 * as in the stream of a migration. Pages come in order.
 */
#ifndef BENCH_RECORDS_H
#define BENCH_RECORDS_H

#include "memory.h"

#include <stddef.h>
#include <sys/uio.h>

/* A system call takes 1024 parts, and a page is two. */
#define RECORDS_MAX 512u

/* Scratch for one call, for as many pages as it has room for. */
struct records {
    uint64_t heads[RECORDS_MAX];
    struct iovec parts[2 * RECORDS_MAX];
};

/*
 * Parts for `count` pages that lie one behind another from `bytes` on, the
 * first of which is page `first`. `count` is at most RECORDS_MAX. Returns how
 * many parts there are.
 */
size_t records_lay_out(struct records *r, uint64_t first, uint8_t *bytes,
                       size_t count);

/* Are the heads those of `count` pages from `first` on? */
bool records_are(const struct records *r, uint64_t first, size_t count,
                 struct fail *why);

#endif
