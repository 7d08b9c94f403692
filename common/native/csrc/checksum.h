/*
 * CRC32C over stored RAM, one of each 64 KiB region.
 *
 * CRC32C is the CRC with polynomial 0x1edc6f41 (Castagnoli), reflected, that
 * begins and ends with all bits inverted: RFC 3720, appendix B.4. It is
 * computed by the processor's own instruction where there is one.
 *
 * A block's regions begin at its offset 0; the last one may be cut off. What is
 * a hole in the file reads as zeroes, and has the checksum of zeroes, but is
 * not read. Nothing here writes to a block's file or maps it: a file that is
 * shorter than it should be is an error and not a signal.
 */
#ifndef POSTCOPY_CHECKSUM_H
#define POSTCOPY_CHECKSUM_H

#include "bitmap.h"

#include <stddef.h>

#define CHECKSUM_REGION_BITS 16
#define CHECKSUM_REGION (UINT64_C(1) << CHECKSUM_REGION_BITS)
/* Of a region that is a hole. */
#define CHECKSUM_OF_HOLE UINT32_C(0x72c0c4a4)

/* The CRC32C of what had the CRC32C `before` (0: nothing) and of `data`. */
uint32_t crc32c(uint32_t before, const void *data, size_t length);
/* The same without the instruction, for processors that lack it. */
uint32_t crc32c_portable(uint32_t before, const void *data, size_t length);
/* Does crc32c() use the instruction here? */
bool crc32c_has_instruction(void);

static inline uint64_t checksum_regions(uint64_t length)
{
    return (length + CHECKSUM_REGION - 1) >> CHECKSUM_REGION_BITS;
}

/* A block: `length` bytes of the file `fd` from `start` on. */
struct checksum_extent {
    int fd;
    uint64_t start;
    uint64_t length;
};

/*
 * The checksums of all regions, to `values`. RESULT_STOPPED when stop_fd
 * becomes readable.
 */
struct result checksum_file(const struct checksum_extent *e, uint32_t *values,
                            int stop_fd);
/*
 * Compare all regions with `values`. RESULT_HOST with EBADMSG: that at `offset`
 * differs and has the checksum `got`.
 */
struct result checksum_verify_file(const struct checksum_extent *e,
                                   const uint32_t *values, int stop_fd);

/*
 * Is a region what it was? `map` is the whole block. Reads through the mapping,
 * which allocates memory where a file on tmpfs has a hole.
 */
struct result checksum_verify_region(const uint8_t *map, uint64_t length,
                                     uint64_t region, uint32_t expected);

/*
 * A block's checksums, and which regions have been compared: for who sends
 * pages in any order and wants each region compared once, before its first
 * page leaves. `values` are the caller's.
 */
struct checksums {
    const uint32_t *values;
    struct checksum_extent extent;
    struct bitmap verified; /* regions; set by any thread */
};

struct result checksums_open(struct checksums *c, const uint32_t *values,
                             const struct checksum_extent *e);
void checksums_close(struct checksums *c);
/*
 * Compare the regions of [offset, offset + length), within the block, that have
 * not been. Any number of threads at once: two may read the same region.
 */
struct result checksums_verify(struct checksums *c, uint64_t offset,
                               uint64_t length);

#endif
