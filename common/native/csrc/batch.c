#include "batch.h"

#include "zero.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* A page's head and its data, the section's head and tail, a mark. */
#define BATCH_IOVS (2 * BATCH_PAGES + 3)
#define BATCH_HEADS                                                    \
    (BATCH_PAGES * WIRE_HEADER_MAX + WIRE_PART_HEAD + WIRE_PART_TAIL + \
     WIRE_PING_LENGTH)

struct result batch_open(struct batch *b)
{
    *b = (struct batch){ 0 };
    b->iov = calloc(BATCH_IOVS, sizeof(*b->iov));
    b->heads = malloc(BATCH_HEADS);
    if (!b->iov || !b->heads) {
        return result_errno(RESULT_HOST, "page batch", ENOMEM);
    }
    return result_ok();
}

void batch_close(struct batch *b)
{
    free(b->iov);
    free(b->heads);
    free(b->copies);
    *b = (struct batch){ 0 };
}

struct result batch_copy(struct batch *b)
{
    b->copies = malloc(BATCH_PAGES * TARGET_PAGE_SIZE);
    return b->copies ? result_ok() :
                       result_errno(RESULT_HOST, "copies of pages", ENOMEM);
}

void batch_reset(struct batch *b)
{
    b->iov_count = 0;
    b->head_used = 0;
    b->head_open = 0;
    b->pages = 0;
    b->zeros = 0;
    b->last = NULL;
    b->copied = NULL;
}

/* Heads that follow each other are one iovec. */
void batch_end(struct batch *b)
{
    if (b->head_used > b->head_open) {
        b->iov[b->iov_count++] = (struct iovec){
            .iov_base = b->heads + b->head_open,
            .iov_len = b->head_used - b->head_open,
        };
        b->head_open = b->head_used;
    }
}

/* `data` NULL: a zero page. */
static void add_record(struct batch *b, const struct ram_block *block,
                       uint64_t offset, const uint8_t *data)
{
    b->head_used += wire_put_record(b->heads + b->head_used, block, offset,
                                    !data, &b->last);
    b->pages++;
    b->copied = NULL;
    if (!data) {
        b->zeros++;
        return;
    }
    batch_end(b);
    b->iov[b->iov_count++] = (struct iovec){
        .iov_base = (void *)(uintptr_t)data,
        .iov_len = TARGET_PAGE_SIZE,
    };
}

void batch_begin_part(struct batch *b, uint32_t section_id)
{
    batch_reset(b);
    b->head_used += wire_put_part_head(b->heads, section_id);
}

void batch_end_part(struct batch *b, uint32_t section_id)
{
    b->head_used += wire_put_part_tail(b->heads + b->head_used, section_id);
    batch_end(b);
}

void batch_add_mark(struct batch *b, uint32_t number)
{
    b->head_used += wire_put_mark(b->heads + b->head_used, number);
    batch_end(b);
}

uint64_t batch_bytes(const struct batch *b)
{
    return b->head_used + (uint64_t)(b->pages - b->zeros) * TARGET_PAGE_SIZE;
}

static void look_at_chunk(struct extent *e, const struct ram_block *b,
                          uint64_t chunk)
{
    uint64_t left = b->length - (chunk << CHUNK_BITS);
    size_t length = (size_t)(left < CHUNK_SIZE ? left : CHUNK_SIZE);

    /* Huge pages are not asked about; what cannot be told counts as data. */
    if (block_is_huge(b) ||
        mincore(b->map + (chunk << CHUNK_BITS), length, e->resident) < 0) {
        memset(e->resident, 1, sizeof(e->resident));
    }
    e->chunk = chunk + 1;
}

/* Not in memory: a hole, up to where the next data is, or swapped out. */
static bool look_for_hole(struct extent *e, const struct ram_block *b,
                          uint64_t offset)
{
    e->hole_start = offset;
    e->hole_end = ram_next_data(b, offset);
    return e->hole_end > offset;
}

static bool is_hole(struct extent *e, const struct ram_block *b, uint64_t page)
{
    uint64_t offset = page << TARGET_PAGE_BITS;
    struct extent here;

    if (bitmap_test(&b->solid, page >> CHUNK_PAGES_BITS)) {
        return false;
    }
    if (!e) {
        return look_for_hole(&here, b, offset);
    }
    if (e->block != b) {
        *e = (struct extent){ .block = b };
    }
    if (offset >= e->hole_start && offset < e->hole_end) {
        return true;
    }
    if (e->chunk != (page >> CHUNK_PAGES_BITS) + 1) {
        look_at_chunk(e, b, page >> CHUNK_PAGES_BITS);
    }
    return !(e->resident[page % CHUNK_PAGES] & 1) &&
           look_for_hole(e, b, offset);
}

static struct result copy_page(struct batch *batch, const struct ram_block *b,
                               uint64_t page, uint8_t *to)
{
    uint64_t offset = page << TARGET_PAGE_BITS;
    struct result r;

    if (batch->copied == b && batch->copied_page == page) {
        return result_ok();
    }
    r = ram_read(b, offset, to, TARGET_PAGE_SIZE);
    batch->copied = RESULT_IS_OK(r) ? b : NULL;
    batch->copied_page = page;
    return r;
}

/* Where the next record's data is. */
static struct result look_at_page(struct batch *batch,
                                  const struct ram_block *b, uint64_t page,
                                  const uint8_t **data)
{
    uint8_t *copy;

    if (!batch->copies) {
        *data = b->map + (page << TARGET_PAGE_BITS);
        return result_ok();
    }
    copy = batch->copies + ((uint64_t)batch->pages << TARGET_PAGE_BITS);
    *data = copy;
    return copy_page(batch, b, page, copy);
}

bool batch_page_is_zero(struct batch *batch, struct extent *e,
                        const struct ram_block *b, uint64_t page, bool *hole)
{
    const uint8_t *data;

    *hole = is_hole(e, b, page);
    return *hole || (RESULT_IS_OK(look_at_page(batch, b, page, &data)) &&
                     page_is_zero(data));
}

struct result batch_add_page(struct batch *batch, struct extent *e,
                             const struct ram_block *b, uint64_t page,
                             bool *hole)
{
    struct result r = result_ok();
    const uint8_t *data = NULL;

    *hole = is_hole(e, b, page);
    if (!*hole) {
        r = look_at_page(batch, b, page, &data);
    }
    if (RESULT_IS_OK(r)) {
        bool zero = *hole || page_is_zero(data);

        add_record(batch, b, page << TARGET_PAGE_BITS, zero ? NULL : data);
    }
    return r;
}
