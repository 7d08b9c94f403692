#include "prepare.h"

#include "limit.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

/* Linux 5.14 and 6.1; older headers lack them. */
#define ADVICE_POPULATE_WRITE 23
#define ADVICE_COLLAPSE 25

static void expect_empty(struct ram_block *b, uint64_t chunk)
{
    bitmap_set_range(&b->received, chunk << CHUNK_PAGES_BITS,
                     block_chunk_pages(b, chunk));
}

struct result prepare_expect_untrusted(struct destination *d,
                                       struct ram_block *b, uint64_t first,
                                       const uint8_t *kinds, uint64_t count)
{
    if (__atomic_load_n(&d->listening, __ATOMIC_SEQ_CST)) {
        return result_stream("layout of RAM in postcopy", 0, first);
    }
    if (first > block_chunks(b) || count > block_chunks(b) - first) {
        return result_stream("layout past the end of its RAM block", 0, first);
    }
    for (uint64_t i = 0; i < count; i++) {
        switch (kinds[i]) {
        case CHUNK_MIXED:
            break;
        case CHUNK_EMPTY:
            expect_empty(b, first + i);
            break;
        case CHUNK_FULL:
            bitmap_test_and_set(&b->expected, first + i);
            break;
        default:
            return result_stream("layout with an unknown kind of chunk", 0,
                                 kinds[i]);
        }
    }
    return result_ok();
}

/*
 * A page of it has to be there before it can be collapsed; fallocate() brings
 * one without a write that a page on its way could be lost under.
 */
static bool allocate_chunk(const struct ram_block *b, uint64_t chunk)
{
    uint8_t *at = b->map + (chunk << CHUNK_BITS);

    return fallocate(b->fd, 0, (off_t)(chunk << CHUNK_BITS),
                     (off_t)TARGET_PAGE_SIZE) == 0 &&
           (madvise(at, CHUNK_SIZE, ADVICE_COLLAPSE) == 0 ||
            madvise(at, CHUNK_SIZE, ADVICE_POPULATE_WRITE) == 0);
}

/* The stream was faster: what it has allocated would only be copied. */
static bool has_begun(const struct ram_block *b, uint64_t chunk)
{
    return bitmap_test(&b->populated, chunk << CHUNK_PAGES_BITS);
}

/* Without memory or without help from the kernel a chunk just stays as it is.
 */
static void prepare_chunk(struct ram_block *b, uint64_t chunk)
{
    if (block_is_huge(b) || block_chunk_pages(b, chunk) < CHUNK_PAGES ||
        has_begun(b, chunk) || !allocate_chunk(b, chunk)) {
        return;
    }
    bitmap_set_range(&b->populated, chunk << CHUNK_PAGES_BITS, CHUNK_PAGES);
    bitmap_test_and_set(&b->prepared, chunk);
}

static bool stopped(int stop_fd)
{
    struct pollfd p = { .fd = stop_fd, .events = POLLIN };

    return poll(&p, 1, 0) > 0;
}

/*
 * A huge page takes a fraction of a millisecond. In a virtual machine whose
 * host has taken free memory back it takes several, more than it saves: give up
 * then.
 */
#define PACE_CHUNKS 8
#define PACE_NS (PACE_CHUNKS * UINT64_C(1000000))

struct pace {
    uint64_t since_ns;
    unsigned chunks;
};

static bool too_slow(struct pace *pace)
{
    uint64_t now = clock_ns();
    bool slow;

    if (pace->chunks++ % PACE_CHUNKS) {
        return false;
    }
    slow = pace->since_ns && now - pace->since_ns > PACE_NS;
    pace->since_ns = now;
    return slow;
}

struct result prepare_run(struct destination *d, int stop_fd)
{
    struct pace pace = { 0 };

    if (d->way == PLACE_COPY) {
        return result_ok(); /* a page that is there cannot be copied over */
    }
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct ram_block *b = &d->ram->blocks[i];
        uint64_t chunk = bitmap_next_set(&b->expected, 0);

        while (chunk < b->expected.bits) {
            if (stopped(stop_fd)) {
                return result_of(RESULT_STOPPED, "stopped");
            }
            if (too_slow(&pace)) {
                return result_ok();
            }
            prepare_chunk(b, chunk);
            chunk = bitmap_next_set(&b->expected, chunk + 1);
        }
    }
    return result_ok();
}
