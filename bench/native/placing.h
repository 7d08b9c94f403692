/*
 * A userfaultfd of this process, by the same thin layer over the kernel that
 * dstd uses (common/native/csrc/uffd.h), with sentences for errors.
 */
#ifndef BENCH_PLACING_H
#define BENCH_PLACING_H

#include "fail.h"

#include <stddef.h>
#include <stdint.h>

int place_open(struct fail *why);
/* As place_open, for a raw descriptor. */
bool place_negotiate(int fd, struct fail *why);

/* Missing and minor faults. */
bool place_watch(int fd, const void *start, uint64_t length, struct fail *why);
bool place_unwatch(int fd, const void *start, uint64_t length,
                   struct fail *why);

/* Pages that are there already are skipped. */
bool place_copy(int fd, const void *to, const void *from, uint64_t length,
                uint64_t page_size, struct fail *why);
bool place_continue(int fd, const void *start, uint64_t length,
                    uint64_t page_size, struct fail *why);

#endif
