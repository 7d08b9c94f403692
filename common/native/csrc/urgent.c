#include "urgent.h"

/*
 * Without a preempt channel the scan goes on behind the requested page: its
 * neighbours are likely next. The hint is 1 + block << HINT_BITS + host page.
 */
#define HINT_BITS 48

static void leave_hint(struct source *s, const struct ram_block *b,
                       uint64_t host)
{
    uint64_t block = (uint64_t)(b - s->ram->blocks);

    if (s->urgent == s->main) {
        __atomic_store_n(&s->hint, 1 + (block << HINT_BITS | host),
                         __ATOMIC_RELAXED);
    }
}

void urgent_take_hint(struct source *s)
{
    uint64_t hint = __atomic_exchange_n(&s->hint, 0, __ATOMIC_RELAXED);

    if (hint) {
        s->cursor_block = (uint32_t)((hint - 1) >> HINT_BITS);
        s->cursor_page = (hint - 1) & ((UINT64_C(1) << HINT_BITS) - 1);
    }
}

/*
 * Neighbours. On a channel of its own the pages behind a requested one are sent
 * along when requests come close together, as those of a guest that goes
 * through its memory in order do, and when they take no longer than this.
 */
#define NEIGHBOURS_MAX 16
#define NEIGHBOURS_NS UINT64_C(50000)

static bool is_near(const struct asked_page *a, const struct ram_block *b,
                    uint64_t host)
{
    return a->block == b &&
           a->host - host + NEIGHBOURS_MAX <= (uint64_t)2 * NEIGHBOURS_MAX;
}

/* Has one of the last few requests been near? Remembers this one. */
static bool comes_in_a_row(struct source *s, const struct ram_block *b,
                           uint64_t host)
{
    bool near = false;

    for (unsigned i = 0; i < RECENT_REQUESTS; i++) {
        near = near || is_near(&s->recent[i], b, host);
    }
    s->recent[s->recent_next++ % RECENT_REQUESTS] =
        (struct asked_page){ b, host };
    return near;
}

static void add_neighbours(struct source *s, struct batch *batch,
                           struct ram_block *b, uint64_t host)
{
    uint64_t most = flow_bytes_in(&s->flow, NEIGHBOURS_NS) >> TARGET_PAGE_BITS;
    uint64_t end = host + 1 + (most < NEIGHBOURS_MAX ? most : NEIGHBOURS_MAX);

    for (uint64_t h = host + 1; h < end && h < block_hosts(b); h++) {
        if (source_claim(b, h)) {
            source_add_host_page(s, batch, NULL, b, h);
            STATS_ADD(s->stats.neighbour_pages, 1);
        }
    }
}

static struct result write_urgent_locked(struct source *s, struct ram_block *b,
                                         uint64_t host)
{
    struct batch *batch = &s->urgent_batch;
    bool own_channel = s->urgent != s->main;

    if (own_channel) {
        batch_reset(batch);
        batch->last = s->urgent->last_block;
    } else {
        batch_begin_part(batch, s->section_id);
    }
    source_add_host_page(s, batch, NULL, b, host);
    if (own_channel && !block_is_huge(b) && comes_in_a_row(s, b, host)) {
        add_neighbours(s, batch, b, host);
    }
    if (own_channel) {
        s->urgent->last_block = batch->last;
        batch_end(batch);
    } else {
        batch_end_part(batch, s->section_id);
    }
    return channel_writev_locked(s->urgent, batch->iov, batch->iov_count);
}

struct result urgent_serve(struct source *s, struct ram_block *block,
                           uint64_t offset, uint64_t asked_ns)
{
    uint64_t host = offset >> block->host_bits;
    struct result r = result_ok();
    uint64_t begun_ns;
    bool owed;

    channel_lock(s->urgent);
    begun_ns = clock_ns();
    owed = source_claim(block, host);
    if (owed) {
        r = write_urgent_locked(s, block, host);
    }
    channel_unlock(s->urgent);
    if (!owed) {
        STATS_ADD(s->stats.requests_late, 1);
        return r;
    }
    histogram_add(&s->stats.queue, begun_ns - asked_ns);
    histogram_add(&s->stats.send, clock_ns() - begun_ns);
    __atomic_store_n(&s->served_ns, begun_ns, __ATOMIC_RELAXED);
    leave_hint(s, block, host);
    source_count(s, &s->urgent_batch);
    STATS_ADD(s->stats.urgent_pages, s->urgent_batch.pages);
    if (s->urgent != s->main) {
        STATS_ADD(s->stats.urgent_on_preempt, s->urgent_batch.pages);
    }
    return r;
}
