/*
 * A kernel file: a 64-bit x86 ELF with the note that names its 32-bit PVH
 * entry. The bytes are not trusted; everything is checked before it is used.
 */
#ifndef MICROVM_KERNEL_H
#define MICROVM_KERNEL_H

#include "fail.h"

#include <stddef.h>
#include <stdint.h>

#define KERNEL_SEGMENTS_MAX 16u
#define KERNEL_FILE_MAX (256u << 20)

struct kernel_segment {
    uint64_t offset;    /* in the file; offset + file_size is inside it */
    uint64_t file_size; /* at most memory_size */
    uint64_t address;   /* guest physical */
    uint64_t memory_size;
};

struct kernel {
    struct kernel_segment segments[KERNEL_SEGMENTS_MAX];
    size_t count;
    uint32_t entry; /* inside one of the segments */
};

/* Segments must lie in guest physical addresses from `low` up to `high`. */
bool kernel_parse(const void *bytes, size_t length, uint64_t low, uint64_t high,
                  struct kernel *kernel, struct fail *why);

#endif
