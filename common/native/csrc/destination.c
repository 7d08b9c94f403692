#include "destination.h"

#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

struct result destination_open(struct destination *d, struct ram *ram,
                               int32_t way, int uffd, const uint32_t *vcpus,
                               uint32_t vcpu_count)
{
    size_t size = (size_t)ram_largest_page(ram);
    void *zeroes;

    *d = (struct destination){ .ram = ram, .way = way, .uffd = uffd };
    rpath_open(&d->rpath);
    waiting_open(&d->waiting, vcpus, vcpu_count);
    d->complete_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->complete_fd < 0) {
        return result_errno(RESULT_HOST, "eventfd", errno);
    }
    zeroes = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (zeroes == MAP_FAILED) {
        return result_errno(RESULT_HOST, "mmap of a zero page", errno);
    }
    d->zeroes = zeroes;
    d->zeroes_length = size;
    return result_ok();
}

void destination_close(struct destination *d)
{
    if (d->zeroes) {
        munmap(d->zeroes, d->zeroes_length);
    }
    if (d->complete_fd >= 0) {
        close(d->complete_fd);
    }
    d->zeroes = NULL;
    d->complete_fd = -1;
    rpath_close(&d->rpath);
    waiting_close(&d->waiting);
}

/* --- before the guest runs ---------------------------------------------- */

static struct result punch(struct ram_block *b, uint64_t start, uint64_t length)
{
    if (fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)start, (off_t)length) < 0) {
        return result_errno(RESULT_HOST, "fallocate(PUNCH_HOLE) of a RAM block",
                            errno);
    }
    bitmap_clear_range(&b->populated, start >> b->host_bits,
                       length >> b->host_bits);
    return result_ok();
}

struct result destination_empty(struct destination *d)
{
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];
        struct result r = punch(b, 0, b->length);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        bitmap_clear_range(&b->received, 0, b->received.bits);
    }
    return result_ok();
}

struct result destination_discard(struct destination *d, uint32_t block,
                                  uint64_t start, uint64_t length)
{
    struct ram_block *b = &d->ram->blocks[block];

    bitmap_clear_range(&b->received, start >> TARGET_PAGE_BITS,
                       length >> TARGET_PAGE_BITS);
    bitmap_set_range(&b->discarded, start >> TARGET_PAGE_BITS,
                     length >> TARGET_PAGE_BITS);
    d->discards++;
    return d->way == PLACE_CONTINUE ? result_ok() : punch(b, start, length);
}

static uint32_t fault_modes(const struct destination *d)
{
    return d->way == PLACE_CONTINUE ? UFFD_MODE_MISSING | UFFD_MODE_MINOR :
                                      UFFD_MODE_MISSING;
}

static struct result unregister_blocks(struct destination *d)
{
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];
        struct result r = uffd_unregister(d->uffd, b->base, b->length);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

static struct result register_blocks(struct destination *d)
{
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];
        struct result r =
            uffd_register(d->uffd, b->base, b->length, fault_modes(d));

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

struct result destination_probe(struct destination *d)
{
    struct result r;

    if (d->way == PLACE_FILE) {
        return result_ok();
    }
    r = register_blocks(d);
    return RESULT_IS_OK(r) ? unregister_blocks(d) : r;
}

/* A host page of which only a part came counts as missing. */
static uint64_t settle_block(struct ram_block *b)
{
    uint64_t per_host = block_pages_per_host(b);
    uint64_t missing = 0;

    if (!block_is_huge(b)) {
        bitmap_copy(&b->claimed, &b->received);
        return b->received.bits - bitmap_count(&b->received);
    }
    for (uint64_t host = 0; host < block_hosts(b); host++) {
        uint64_t first = host << block_pages_bits(b);

        if (bitmap_all_set(&b->received, first, per_host)) {
            bitmap_test_and_set(&b->claimed, host);
        } else {
            bitmap_clear_range(&b->received, first, per_host);
            bitmap_test_and_clear(&b->claimed, host);
            missing++;
        }
    }
    return missing;
}

void destination_note_complete(struct destination *d)
{
    uint64_t one = 1;

    (void)!write(d->complete_fd, &one, sizeof(one));
}

/* What is claimed is what is here; returns the number of the others. */
static uint64_t settle(struct destination *d)
{
    uint64_t missing = 0;

    for (uint32_t i = 0; i < d->ram->count; i++) {
        missing += settle_block(&d->ram->blocks[i]);
    }
    __atomic_store_n(&d->missing, missing, __ATOMIC_SEQ_CST);
    return missing;
}

/* Only what was discarded is still to come. */
static void excuse_unsent(struct destination *d)
{
    for (uint32_t i = 0; d->discards && i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];
        uint64_t page = 0;

        while (page < b->discarded.bits) {
            uint64_t next = bitmap_next_set(&b->discarded, page);

            bitmap_set_range(&b->received, page, next - page);
            page = bitmap_next_clear(&b->discarded, next);
        }
    }
}

struct result destination_listen(struct destination *d)
{
    struct result r = result_ok();
    uint64_t missing;

    if (d->unsent_is_hole) {
        excuse_unsent(d);
    }
    missing = settle(d);
    if (d->way != PLACE_FILE) {
        r = register_blocks(d);
    }
    __atomic_store_n(&d->listening, 1, __ATOMIC_SEQ_CST);
    if (missing == 0) {
        destination_note_complete(d);
    }
    return r;
}

struct result destination_wake(struct destination *d)
{
    struct result r = result_ok();

    for (uint32_t i = 0; d->way != PLACE_FILE && i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];

        r = uffd_wake(d->uffd, b->base, b->length);
        if (!RESULT_IS_OK(r)) {
            break;
        }
    }
    return r;
}

/* A page that could be written but not mapped is here, and nobody maps it. */
struct result destination_begin_epoch(struct destination *d)
{
    if (settle(d) == 0) {
        destination_note_complete(d);
    }
    return destination_wake(d);
}

struct result destination_finish(struct destination *d)
{
    __atomic_store_n(&d->listening, 0, __ATOMIC_SEQ_CST);
    return d->way == PLACE_FILE ? result_ok() : unregister_blocks(d);
}

uint64_t destination_missing(struct destination *d)
{
    return __atomic_load_n(&d->missing, __ATOMIC_SEQ_CST);
}
