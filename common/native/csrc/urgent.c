#include "urgent.h"

/*
 * Without a preempt channel, and if all RAM is still to come, the scan goes on
 * behind the requested page: its neighbours are likely next. The hint is 1 +
 * block << HINT_BITS + host page.
 */
#define HINT_BITS 48

static void leave_hint(struct source *s, const struct ram_block *b,
                       uint64_t host)
{
    uint64_t block = (uint64_t)(b - s->ram->blocks);

    if (source_urgent(s) == s->main || s->stored) {
        __atomic_store_n(&s->hint, 1 + (block << HINT_BITS | host),
                         __ATOMIC_RELAXED);
    }
}

bool urgent_take_hint(struct source *s)
{
    uint64_t hint = __atomic_exchange_n(&s->hint, 0, __ATOMIC_RELAXED);

    if (hint) {
        s->cursor_block = (uint32_t)((hint - 1) >> HINT_BITS);
        s->cursor_page = (hint - 1) & ((UINT64_C(1) << HINT_BITS) - 1);
    }
    return hint;
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

/* What is damaged is told when it is asked for, or by the pump. */
static bool may_go_along(struct source *s, const struct ram_block *b,
                         uint64_t host)
{
    return !s->stored ||
           (bitmap_test(&b->owed, host) && source_has(s, b, host) &&
            RESULT_IS_OK(source_check(s, b, host)) &&
            !source_leaves_out(s, &s->urgent_batch, NULL, b, host));
}

/* What went along would have been asked for next, perhaps. */
static void note_page(struct source *s, const struct ram_block *b,
                      uint64_t host)
{
    if (s->stored) {
        working_set_note(
            &s->stored->working_set,
            working_set_page((uint64_t)(b - s->ram->blocks), host));
    }
}

/* The window tells of a link that is not known yet more than it can do. */
static uint64_t neighbours(struct source *s)
{
    uint64_t most = flow_bytes_in(&s->flow, NEIGHBOURS_NS) >> TARGET_PAGE_BITS;
    uint64_t page_ns = flow_link_ns(&s->flow, TARGET_PAGE_SIZE);

    if (most > NEIGHBOURS_MAX) {
        most = NEIGHBOURS_MAX;
    }
    return most * page_ns > NEIGHBOURS_NS ? NEIGHBOURS_NS / page_ns : most;
}

static struct result add_neighbours(struct source *s, struct batch *batch,
                                    struct ram_block *b, uint64_t host)
{
    struct result r = result_ok();
    uint64_t end = host + 1 + neighbours(s);

    if (end > block_hosts(b)) {
        end = block_hosts(b);
    }
    for (uint64_t h = host + 1; h < end && RESULT_IS_OK(r); h++) {
        if (may_go_along(s, b, h) && source_claim(b, h)) {
            r = source_add_host_page(s, batch, NULL, b, h);
            STATS_ADD(s->stats.neighbour_pages, 1);
            note_page(s, b, h);
        }
    }
    return r;
}

static struct result write_urgent_locked(struct source *s,
                                         struct channel *urgent,
                                         struct ram_block *b, uint64_t host)
{
    struct batch *batch = &s->urgent_batch;
    bool own_channel = urgent != s->main;
    struct result r;

    if (own_channel) {
        batch_reset(batch);
        batch->last = urgent->last_block;
    } else {
        batch_begin_part(batch, s->section_id);
    }
    r = source_add_host_page(s, batch, NULL, b, host);
    note_page(s, b, host);
    if (own_channel && !block_is_huge(b) && comes_in_a_row(s, b, host) &&
        RESULT_IS_OK(r)) {
        r = add_neighbours(s, batch, b, host);
    }
    if (!RESULT_IS_OK(r)) {
        return r;
    }
    if (own_channel) {
        urgent->last_block = batch->last;
        batch_end(batch);
    } else {
        batch_end_part(batch, s->section_id);
    }
    return channel_writev_locked(urgent, batch->iov, batch->iov_count);
}

/*
 * A page of zeroes that was left out may be asked for after the end. On main
 * nobody would read it, and the peer needs it no more; on a channel of its own
 * the peer waits for it, unless it has closed that by now.
 */
static bool has_ended(const struct source *s)
{
    return __atomic_load_n(&s->ended, __ATOMIC_SEQ_CST);
}

static bool claim_locked(const struct source *s, const struct channel *urgent,
                         struct ram_block *b, uint64_t host)
{
    return !(has_ended(s) && urgent == s->main) && source_claim(b, host);
}

static struct result await_page(struct source *s, struct ram_block *block,
                                uint64_t host, uint64_t asked_ns)
{
    if (!arriving_await(s->arriving, block, host, asked_ns)) {
        return result_stream("requests for more pages than can be awaited",
                             host << block->host_bits, AWAITED_MAX);
    }
    STATS_ADD(s->stats.awaited_pages, 1);
    arriving_ask(s->arriving, clock_ns());
    return result_ok();
}

struct result urgent_serve_arrived(struct source *s)
{
    struct result r = result_ok();
    struct awaited page;

    if (!urgent_awaits(s)) {
        return r;
    }
    while (RESULT_IS_OK(r) && arriving_take(s->arriving, &page)) {
        r = urgent_serve(s, page.block, page.host << page.block->host_bits,
                         page.since_ns);
    }
    arriving_ask(s->arriving, clock_ns());
    return r;
}

struct result urgent_serve(struct source *s, struct ram_block *block,
                           uint64_t offset, uint64_t asked_ns)
{
    struct channel *urgent = source_urgent(s);
    uint64_t host = offset >> block->host_bits;
    struct result r = result_ok();
    uint64_t begun_ns;
    bool owed;

    if (bitmap_test(&block->owed, host)) {
        if (!source_has(s, block, host)) {
            return await_page(s, block, host, asked_ns);
        }
        r = source_check(s, block, host);
    }
    if (!RESULT_IS_OK(r)) {
        return r;
    }
    channel_lock(urgent);
    begun_ns = clock_ns();
    owed = claim_locked(s, urgent, block, host);
    if (owed) {
        r = write_urgent_locked(s, urgent, block, host);
    }
    channel_unlock(urgent);
    if (!owed) {
        STATS_ADD(s->stats.requests_late, 1);
        return r;
    }
    if (r.kind == RESULT_CHANNEL && has_ended(s)) {
        r = result_ok();
    }
    histogram_add(&s->stats.queue, begun_ns - asked_ns);
    histogram_add(&s->stats.send, clock_ns() - begun_ns);
    __atomic_store_n(&s->served_ns, begun_ns, __ATOMIC_RELAXED);
    leave_hint(s, block, host);
    source_count(s, &s->urgent_batch);
    STATS_ADD(s->stats.urgent_pages, s->urgent_batch.pages);
    if (urgent != s->main) {
        STATS_ADD(s->stats.urgent_on_preempt, s->urgent_batch.pages);
    }
    return r;
}
