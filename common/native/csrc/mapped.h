/*
 * RAM in a file of QEMU's mapped-ram: each page at a place of its own.
 *
 * A bitmap says which pages are data. The others are zero, whatever their place
 * in the file holds: a page that was data when it was first written, and zero
 * later, leaves the old bytes behind. So such a file can be used as it is only
 * where no page that is zero has bytes.
 */
#ifndef POSTCOPY_MAPPED_H
#define POSTCOPY_MAPPED_H

#include "bitmap.h"

/* Page 0 of the block is at `start` of the file `fd`. */
struct mapped {
    int fd;
    uint64_t start;
    const struct bitmap *data; /* target pages */
};

/*
 * How many pages that are zero have other bytes in the file. With `punch` these
 * become holes; `fd` must be writable then.
 */
struct result mapped_stale(const struct mapped *m, bool punch, uint64_t *pages,
                           int stop_fd);
/*
 * Copy the pages that are data to the same offsets of `to`, within the kernel
 * where it can: file systems that share blocks share them.
 */
struct result mapped_copy(const struct mapped *m, int to, int stop_fd);

#endif
