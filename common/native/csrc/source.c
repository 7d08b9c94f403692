#include "source.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct result source_open(struct source *s, struct ram *ram,
                          uint32_t section_id)
{
    struct result r;

    *s = (struct source){ .ram = ram, .section_id = section_id };
    flow_open(&s->flow, ram_largest_page(ram));
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake_fd < 0) {
        return result_errno(RESULT_HOST, "eventfd", errno);
    }
    r = batch_open(&s->batch);
    if (RESULT_IS_OK(r)) {
        r = batch_open(&s->urgent_batch);
    }
    return r;
}

struct result source_serve(struct source *s, struct stored *stored)
{
    struct result r = batch_copy(&s->batch);

    s->stored = stored;
    return RESULT_IS_OK(r) ? batch_copy(&s->urgent_batch) : r;
}

void source_await(struct source *s, struct arriving *arriving)
{
    s->arriving = arriving;
}

void source_close(struct source *s)
{
    batch_close(&s->batch);
    batch_close(&s->urgent_batch);
    flow_close(&s->flow);
    if (s->wake_fd >= 0) {
        close(s->wake_fd);
    }
    s->wake_fd = -1;
}

void source_connect(struct source *s, struct channel *main_channel,
                    struct channel *urgent)
{
    s->main = main_channel;
    s->urgent = urgent;
    s->asked = NULL;
    flow_restart(&s->flow);
    s->cursor_block = 0;
    s->cursor_page = 0;
    if (s->stored) {
        stored_restart(s->stored);
        __atomic_store_n(&s->stats.left_out_pages, 0, __ATOMIC_RELAXED);
    }
    if (s->arriving) {
        arriving_forget(s->arriving);
    }
    __atomic_store_n(&s->ended, 0, __ATOMIC_SEQ_CST);
}

void source_use_preempt(struct source *s, struct channel *preempt)
{
    __atomic_store_n(&s->urgent, preempt, __ATOMIC_SEQ_CST);
}

void source_wake(struct source *s)
{
    uint64_t one = 1;

    /* Full means that it is readable already. */
    (void)!write(s->wake_fd, &one, sizeof(one));
}

void source_limit(struct source *s, uint64_t bytes_per_second)
{
    limit_set(&s->limit, bytes_per_second);
    source_wake(s);
}

void source_yield(struct source *s, bool yield)
{
    __atomic_store_n(&s->yield, yield, __ATOMIC_SEQ_CST);
    source_wake(s);
}

struct result source_add_page(struct source *s, struct batch *batch,
                              struct extent *e, const struct ram_block *b,
                              uint64_t page)
{
    bool hole;
    struct result r = batch_add_page(batch, e, b, page, &hole);

    if (!RESULT_IS_OK(r)) {
        stored_damaged(s->stored, b, r.offset);
    } else if (hole) {
        STATS_ADD(s->stats.hole_pages, 1);
    }
    return r;
}

void source_count(struct source *s, const struct batch *b)
{
    STATS_ADD(s->stats.zero_pages, b->zeros);
    STATS_ADD(s->stats.normal_pages, b->pages - b->zeros);
}

uint64_t source_dirty_pages(const struct source *s)
{
    uint64_t pages = 0;

    for (uint32_t i = 0; i < s->ram->count; i++) {
        pages += bitmap_count(&s->ram->blocks[i].dirty);
    }
    return pages;
}

static void owe_block(struct ram_block *b)
{
    uint64_t page = bitmap_next_set(&b->dirty, 0);

    while (page < b->dirty.bits) {
        uint64_t end = bitmap_next_clear(&b->dirty, page);
        uint64_t first = page >> block_pages_bits(b);
        uint64_t last = (end - 1) >> block_pages_bits(b);

        bitmap_set_range(&b->owed, first, last - first + 1);
        page = bitmap_next_set(&b->dirty, end);
    }
}

uint64_t source_owe_dirty(struct source *s)
{
    for (uint32_t i = 0; i < s->ram->count; i++) {
        owe_block(&s->ram->blocks[i]);
    }
    if (source_owed_pages(s) == 0) {
        bitmap_test_and_set(&s->ram->blocks[0].owed, 0);
    }
    s->cursor_block = 0;
    s->cursor_page = 0;
    s->extent = (struct extent){ 0 };
    return source_owed_pages(s);
}

static bool has_all(const uint8_t *bits, uint64_t first, uint64_t count)
{
    for (uint64_t i = first; i < first + count; i++) {
        if (!(bits[i / 8] >> (i % 8) & 1)) {
            return false;
        }
    }
    return true;
}

void source_owe_missing(struct ram_block *b, const uint8_t *received)
{
    uint64_t per_host = block_pages_per_host(b);

    bitmap_clear_range(&b->owed, 0, b->owed.bits);
    for (uint64_t host = 0; host < block_hosts(b); host++) {
        if (!has_all(received, host * per_host, per_host)) {
            bitmap_test_and_set(&b->owed, host);
        }
    }
}

/* Of what was left out, all that nobody asked for is still owed. */
static uint64_t owed_hosts(const struct source *s, const struct ram_block *b)
{
    const struct bitmap *left_out;
    uint64_t hosts = 0;

    if (!s->stored) {
        return bitmap_count(&b->owed);
    }
    left_out = stored_left_out(s->stored, b);
    for (uint64_t word = 0; word < (b->owed.bits + 63) / 64; word++) {
        uint64_t owed =
            __atomic_load_n(&b->owed.words[word], __ATOMIC_RELAXED) &
            ~__atomic_load_n(&left_out->words[word], __ATOMIC_RELAXED);

        hosts += (uint64_t)__builtin_popcountll(owed);
    }
    return hosts;
}

uint64_t source_owed_pages(const struct source *s)
{
    uint64_t pages = 0;

    for (uint32_t i = 0; i < s->ram->count; i++) {
        const struct ram_block *b = &s->ram->blocks[i];

        pages += owed_hosts(s, b) * block_pages_per_host(b);
    }
    return pages;
}

bool source_leaves_out(const struct source *s, struct batch *batch,
                       struct extent *e, const struct ram_block *b,
                       uint64_t host)
{
    uint64_t first = host << block_pages_bits(b);
    bool hole;

    if (!s->stored || !s->stored->leave_out_zeroes) {
        return false;
    }
    for (uint64_t i = 0; i < block_pages_per_host(b); i++) {
        if (!batch_page_is_zero(batch, e, b, first + i, &hole)) {
            return false;
        }
    }
    return true;
}

bool source_claim(struct ram_block *b, uint64_t host)
{
    return bitmap_test_and_clear(&b->owed, host);
}

struct result source_add_host_page(struct source *s, struct batch *batch,
                                   struct extent *e, const struct ram_block *b,
                                   uint64_t host)
{
    uint64_t first = host << block_pages_bits(b);
    struct result r = result_ok();

    for (uint64_t i = 0; i < block_pages_per_host(b) && RESULT_IS_OK(r); i++) {
        r = source_add_page(s, batch, e, b, first + i);
    }
    return r;
}
