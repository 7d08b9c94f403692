/*
 * RAM blocks: named pieces of guest RAM, each behind one descriptor.
 *
 * The table is filled once, before any loop starts, and never changes its
 * shape after that; only the bitmaps change, atomically.
 *
 * A *target page* is the unit of the wire, 4 KiB. A *host page* is the unit
 * that the kernel places, page_size of the block. `page` is an index of target
 * pages, `host` of host pages, `offset` is in bytes.
 */
#ifndef POSTCOPY_RAM_H
#define POSTCOPY_RAM_H

#include "bitmap.h"

#include <stddef.h>

#define TARGET_PAGE_BITS 12
#define TARGET_PAGE_SIZE ((uint64_t)1 << TARGET_PAGE_BITS)
#define HOST_PAGE_MAX ((uint64_t)2 << 20)
/* What a layout tells about in one go, and what is allocated in one. */
#define CHUNK_BITS 21
#define CHUNK_SIZE ((uint64_t)1 << CHUNK_BITS)
#define CHUNK_PAGES_BITS (CHUNK_BITS - TARGET_PAGE_BITS)
#define CHUNK_PAGES ((uint64_t)1 << CHUNK_PAGES_BITS)
#define IDSTR_MAX 255
#define RAM_BLOCKS_MAX 4096

struct ram_block {
    char idstr[IDSTR_MAX + 1];
    uint8_t idstr_length;
    uint64_t length;
    uint64_t page_size;
    unsigned host_bits; /* log2 of page_size */
    uint64_t base;      /* in the guest's process; 0 if nobody runs on it */
    int fd;
    uint64_t start; /* of the block in the file; 0 but for stored RAM */
    uint8_t *map;   /* our mapping: the source reads through it, the
                       destination writes through it where that allocates
                       nothing: huge pages and prepared chunks */
    size_t map_length;

    /* Source. */
    struct bitmap dirty; /* target pages still to send in precopy */
    struct bitmap owed;  /* host pages still to send in postcopy */
    struct bitmap solid; /* chunks without a hole, as layout_look() saw them */

    /* Destination. */
    struct bitmap received;  /* target pages that are here; see place.h */
    struct bitmap discarded; /* target pages that the source took back */
    struct bitmap requested; /* host pages that a fault was about */
    struct bitmap claimed;   /* host pages some load loop is filling or has */
    struct bitmap populated; /* host pages that hold memory in the file */
    struct bitmap mapped;    /* host pages that the guest sees for certain */
    struct bitmap expected;  /* chunks that will be sent whole; prepare.h */
    struct bitmap prepared;  /* of these, the ones that are allocated */
};

struct ram {
    struct ram_block *blocks;
    uint32_t count;
    uint32_t capacity;
    uint64_t total; /* bytes, all blocks */
};

/* Room for `capacity` blocks; 1 to RAM_BLOCKS_MAX. */
struct result ram_open(struct ram *ram, uint32_t capacity);
/* Unmaps and frees; the blocks' descriptors stay the caller's. */
void ram_close(struct ram *ram);

/*
 * Add a block. `length` must be a multiple of `page_size`, which is a power of
 * two from TARGET_PAGE_SIZE to HOST_PAGE_MAX, and within the file.
 */
struct result ram_add(struct ram *ram, const char *idstr, uint64_t length,
                      uint64_t page_size, uint64_t base, int fd);
/*
 * The block added last begins at `start` of its file, a multiple of
 * TARGET_PAGE_SIZE. For a source, and before it is prepared.
 */
struct result ram_start_at(struct ram *ram, uint64_t start);

/* The bitmaps and the mapping that each side needs. */
struct result ram_prepare_source(struct ram *ram);
/*
 * `kept_fd` is a file of ram_kept_length() bytes for what whoever comes after
 * us has to know, `received` and `populated` of every block; -1: nobody will.
 */
struct result ram_prepare_destination(struct ram *ram, int kept_fd);
uint64_t ram_kept_length(const struct ram *ram);

/* NULL if there is no such block. `name` needs no terminator. */
struct ram_block *ram_find(struct ram *ram, const void *name, size_t length);
/*
 * First byte at or after `offset` of the block's file that may hold data; its
 * length if there is none. A file system that cannot tell says `offset`, and so
 * does a file that ends before the block: what it lacks is no hole.
 */
uint64_t ram_next_data(const struct ram_block *b, uint64_t offset);
/*
 * Read [offset, offset + length) of the block from its file, not through the
 * mapping. RESULT_HOST with the offset that could not be read.
 */
struct result ram_read(const struct ram_block *b, uint64_t offset, void *to,
                       uint64_t length);
/* Of all blocks' host pages; bytes. */
uint64_t ram_largest_page(const struct ram *ram);
/* The block that the guest's process maps at `address`, or NULL. */
struct ram_block *ram_at(struct ram *ram, uint64_t address);

static inline uint64_t block_pages(const struct ram_block *b)
{
    return b->length >> TARGET_PAGE_BITS;
}

static inline uint64_t block_hosts(const struct ram_block *b)
{
    return b->length >> b->host_bits;
}

static inline uint64_t block_chunks(const struct ram_block *b)
{
    return (b->length + CHUNK_SIZE - 1) >> CHUNK_BITS;
}

/* Target pages in a chunk; the last one may be cut off. */
static inline uint64_t block_chunk_pages(const struct ram_block *b,
                                         uint64_t chunk)
{
    uint64_t left = block_pages(b) - (chunk << CHUNK_PAGES_BITS);

    return left < CHUNK_PAGES ? left : CHUNK_PAGES;
}

static inline unsigned block_pages_bits(const struct ram_block *b)
{
    return b->host_bits - TARGET_PAGE_BITS;
}

/* Target pages in one host page. */
static inline uint64_t block_pages_per_host(const struct ram_block *b)
{
    return UINT64_C(1) << block_pages_bits(b);
}

static inline bool block_is_huge(const struct ram_block *b)
{
    return b->page_size != TARGET_PAGE_SIZE;
}

#endif
