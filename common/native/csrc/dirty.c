#include "dirty.h"

#include "uffd.h"

#include <errno.h>
#include <sys/ioctl.h>

/* From the kernel's include/uapi/linux/fs.h, Linux 6.7. */
struct scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

struct scan_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

#define IOCTL_PAGEMAP_SCAN _IOWR('f', 16, struct scan_arg)
#define SCAN_WP_MATCHING 1
#define SCAN_CHECK_WPASYNC 2
#define PAGE_IS_WRITTEN 2

/* More would save little: 512 cost 3 % more than no bound at all. */
#define REGIONS 512

struct result dirty_start(struct dirty *d)
{
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];
        struct result r = result_ok();

        bitmap_set_range(&b->dirty, 0, b->dirty.bits);
        if (d->way != DIRTY_WP_ASYNC) {
            continue;
        }
        r = uffd_register(d->uffd, b->base, b->length, UFFD_MODE_WP);
        if (RESULT_IS_OK(r)) {
            r = uffd_protect(d->uffd, b->base, b->length);
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

static uint64_t mark_regions(struct ram_block *b,
                             const struct scan_region *regions, int count)
{
    uint64_t pages = 0;

    for (int i = 0; i < count; i++) {
        uint64_t first = (regions[i].start - b->base) >> TARGET_PAGE_BITS;
        uint64_t end = (regions[i].end - b->base) >> TARGET_PAGE_BITS;

        bitmap_set_range(&b->dirty, first, end - first);
        pages += end - first;
    }
    return pages;
}

/* The result comes in pieces; the walk is over when it reached the end. */
static struct result scan(struct dirty *d, struct ram_block *b, uint64_t at,
                          uint64_t end, uint64_t *pages)
{
    struct scan_region regions[REGIONS];

    while (at < end) {
        struct scan_arg arg = {
            .size = sizeof(arg),
            /* Without CHECK, memory that is not tracked looks unwritten. */
            .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
            .start = at,
            .end = end,
            .vec = (uint64_t)(uintptr_t)regions,
            .vec_len = REGIONS,
            .category_mask = PAGE_IS_WRITTEN,
            .return_mask = PAGE_IS_WRITTEN,
        };
        int n = ioctl(d->pagemap, IOCTL_PAGEMAP_SCAN, &arg);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return result_errno(errno == ESRCH ? RESULT_GUEST : RESULT_HOST,
                                "PAGEMAP_SCAN", errno);
        }
        *pages += mark_regions(b, regions, n);
        at = arg.walk_end;
    }
    return result_ok();
}

static struct result scan_block(struct dirty *d, struct ram_block *b,
                                uint64_t *pages)
{
    return scan(d, b, b->base, b->base + b->length, pages);
}

static bool chunk_is_dirty(const struct ram_block *b, uint64_t chunk)
{
    return bitmap_all_set(&b->dirty, chunk << CHUNK_PAGES_BITS,
                          block_chunk_pages(b, chunk));
}

/* Is there something in it that a scan could find? What is dirty stays so. */
static bool is_worth_a_scan(const struct ram_block *b, uint64_t chunk,
                            uint64_t *data)
{
    uint64_t start = chunk << CHUNK_BITS;

    if (chunk_is_dirty(b, chunk)) {
        return false;
    }
    /* Nobody wrote where the file has a hole. */
    if (*data < start) {
        *data = ram_next_data(b, start);
    }
    return *data < start + CHUNK_SIZE;
}

static struct result scan_what_is_clean(struct dirty *d, struct ram_block *b,
                                        uint64_t *pages)
{
    uint64_t chunks = block_chunks(b);
    uint64_t data = ram_next_data(b, 0);

    for (uint64_t chunk = 0; chunk < chunks; chunk++) {
        uint64_t first = chunk;
        uint64_t end;
        struct result r;

        while (chunk < chunks && is_worth_a_scan(b, chunk, &data)) {
            chunk++;
        }
        end = chunk < chunks ? chunk << CHUNK_BITS : b->length;
        r = scan(d, b, b->base + (first << CHUNK_BITS), b->base + end, pages);
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

static struct result sync_blocks(struct dirty *d, uint64_t *pages,
                                 struct result (*scan_one)(struct dirty *,
                                                           struct ram_block *,
                                                           uint64_t *))
{
    *pages = 0;
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];

        if (d->way == DIRTY_UNKNOWN) {
            bitmap_set_range(&b->dirty, 0, b->dirty.bits);
            *pages += b->dirty.bits;
        } else if (d->way == DIRTY_WP_ASYNC) {
            struct result r = scan_one(d, b, pages);

            if (!RESULT_IS_OK(r)) {
                return r;
            }
        }
    }
    return result_ok();
}

struct result dirty_sync(struct dirty *d, uint64_t *pages)
{
    return sync_blocks(d, pages, scan_block);
}

struct result dirty_sync_last(struct dirty *d, uint64_t *pages)
{
    return sync_blocks(d, pages, scan_what_is_clean);
}

struct result dirty_stop(struct dirty *d)
{
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];

        if (d->way == DIRTY_WP_ASYNC) {
            /* Fails where dirty_start() did not get to: nothing to undo. */
            (void)uffd_unregister(d->uffd, b->base, b->length);
        }
    }
    return result_ok();
}
