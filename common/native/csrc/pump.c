#include "pump.h"

#include "pace.h"
#include "turn.h"
#include "urgent.h"

/* In postcopy a request on main waits for at most this much in front of it. */
#define POSTCOPY_UNSENT_MAX (128u * 1024)

/* --- one part ----------------------------------------------------------- */

/* `marked`: the peer's answers bound how much is sent ahead. */
static struct result write_part(struct source *s, struct batch *b, bool marked)
{
    struct result r;
    uint32_t mark;

    batch_end_part(b, s->section_id);
    limit_take(&s->limit, batch_bytes(b));
    if (marked && flow_send(&s->flow, batch_bytes(b), clock_ns(), &mark)) {
        batch_add_mark(b, mark);
    }
    if (channel_lock(s->main)) {
        STATS_ADD(s->stats.background_waits, 1);
    }
    r = channel_writev_locked(s->main, b->iov, b->iov_count);
    channel_unlock(s->main);
    source_count(s, b);
    return r;
}

/* The next dirty page at or after the cursor; false at the end of the pass. */
static bool next_dirty(struct source *s, struct ram_block **block,
                       uint64_t *page)
{
    while (s->cursor_block < s->ram->count) {
        struct ram_block *b = &s->ram->blocks[s->cursor_block];
        uint64_t p = bitmap_next_set(&b->dirty, s->cursor_page);

        if (p < b->dirty.bits) {
            *block = b;
            *page = p;
            s->cursor_page = p + 1;
            return true;
        }
        s->cursor_block++;
        s->cursor_page = 0;
    }
    return false;
}

/* Only postcopy can wait for a page. */
static struct result check_here(struct source *s, const struct ram_block *b,
                                uint64_t host)
{
    if (!source_has(s, b, host)) {
        return result_of(RESULT_HOST, "the VM has not wholly arrived; serve it"
                                      " by postcopy, or wait");
    }
    return source_check(s, b, host);
}

/* Bits are cleared before the page is read: a later write sets them again. */
static struct result fill_precopy(struct source *s, struct batch *batch,
                                  uint32_t most)
{
    struct result r = result_ok();
    struct ram_block *b;
    uint64_t page;

    batch_begin_part(batch, s->section_id);
    while (RESULT_IS_OK(r) && batch->pages < most && next_dirty(s, &b, &page)) {
        r = check_here(s, b, page >> block_pages_bits(b));
        if (!RESULT_IS_OK(r)) {
            return r;
        }
        bitmap_test_and_clear(&b->dirty, page);
        r = source_add_page(s, batch, &s->extent, b, page);
    }
    return r;
}

struct result pump_precopy(struct source *s)
{
    s->cursor_block = 0;
    s->cursor_page = 0;
    s->extent = (struct extent){ 0 };
    while (!source_must_yield(s)) {
        struct result r = pace_limit(s);

        if (RESULT_IS_OK(r) && source_must_yield(s)) {
            break;
        }
        if (RESULT_IS_OK(r)) {
            r = fill_precopy(s, &s->batch, pace_pages(s));
        }
        if (RESULT_IS_OK(r) && !s->batch.pages) {
            return r;
        }
        if (RESULT_IS_OK(r)) {
            r = write_part(s, &s->batch, false);
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_of(RESULT_STOPPED, "yield");
}

/* --- postcopy ----------------------------------------------------------- */

static struct result write_discard(struct source *s, const struct ram_block *b,
                                   const struct wire_range *ranges,
                                   uint32_t count)
{
    uint8_t command[WIRE_DISCARD_MAX];

    return channel_write(s->main, command,
                         wire_put_discard(command, b, ranges, count));
}

static struct result discard_block(struct source *s, const struct ram_block *b)
{
    struct wire_range ranges[DISCARD_RANGES];
    uint64_t first = bitmap_next_set(&b->owed, 0);
    uint32_t count = 0;

    while (first < b->owed.bits) {
        uint64_t end = bitmap_next_clear(&b->owed, first);

        ranges[count++] = (struct wire_range){
            .start = first << b->host_bits,
            .length = (end - first) << b->host_bits,
        };
        first = bitmap_next_set(&b->owed, end);
        if (count == DISCARD_RANGES || first >= b->owed.bits) {
            struct result r = write_discard(s, b, ranges, count);

            if (!RESULT_IS_OK(r)) {
                return r;
            }
            count = 0;
        }
    }
    return result_ok();
}

struct result pump_discards(struct source *s)
{
    for (uint32_t i = 0; i < s->ram->count; i++) {
        struct result r = discard_block(s, &s->ram->blocks[i]);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

/* The first host page of a block from `from` on that is owed and not left out.
 */
static uint64_t next_in_block(const struct source *s, const struct ram_block *b,
                              uint64_t from)
{
    uint64_t h = bitmap_next_set(&b->owed, from);

    while (s->stored && h < b->owed.bits) {
        uint64_t end = bitmap_next_clear(stored_left_out(s->stored, b), h);

        if (end == h) {
            break;
        }
        h = bitmap_next_set(&b->owed, end);
    }
    return h;
}

/* Likewise, of those that are here. */
static uint64_t next_here(const struct source *s, const struct ram_block *b,
                          uint64_t from)
{
    const struct bitmap *left_out = stored_left_out(s->stored, b);
    uint64_t mask = ~UINT64_C(0) << (from % 64);

    for (uint64_t word = from / 64; word * 64 < b->owed.bits; word++) {
        uint64_t found =
            mask & __atomic_load_n(&b->owed.words[word], __ATOMIC_SEQ_CST) &
            ~__atomic_load_n(&left_out->words[word], __ATOMIC_RELAXED);

        if (found) {
            found &= arriving_word(s->arriving, b, word);
        }
        if (found) {
            return word * 64 + (uint64_t)__builtin_ctzll(found);
        }
        mask = ~UINT64_C(0);
    }
    return b->owed.bits;
}

/*
 * The next host page that is owed and here, from the cursor on and around; the
 * same one again as long as it is.
 */
static bool next_owed(struct source *s, struct ram_block **block,
                      uint64_t *host)
{
    for (uint32_t i = 0; i <= s->ram->count; i++) {
        struct ram_block *b = &s->ram->blocks[s->cursor_block];
        uint64_t h = s->arriving ? next_here(s, b, s->cursor_page) :
                                   next_in_block(s, b, s->cursor_page);

        if (h < b->owed.bits) {
            *block = b;
            *host = s->cursor_page = h;
            return true;
        }
        s->cursor_block = (s->cursor_block + 1) % s->ram->count;
        s->cursor_page = 0;
    }
    return false;
}

/* Pages of zeroes are sent unasked only if the guest has asked before. */
static struct result add_owed(struct source *s, struct batch *batch,
                              struct ram_block *b, uint64_t host,
                              bool asked_before)
{
    struct result r = result_ok();
    /* What is known of holes does not hold while pages arrive. */
    struct extent *extent = s->arriving ? NULL : &s->extent;

    if (!asked_before && source_leaves_out(s, batch, extent, b, host)) {
        bitmap_test_and_set(stored_left_out(s->stored, b), host);
        STATS_ADD(s->stats.left_out_pages, block_pages_per_host(b));
    } else if (source_claim(b, host)) {
        r = source_add_host_page(s, batch, extent, b, host);
        STATS_ADD(s->stats.working_set_pages,
                  asked_before ? block_pages_per_host(b) : 0);
    }
    return r;
}

/*
 * Behind a request that the working set has not foreseen, others follow: so do
 * the pages behind it, as many as the link takes in this time.
 */
#define AHEAD_PAGES 16
#define AHEAD_NS UINT64_C(500000)

static uint32_t ahead_pages(struct source *s)
{
    uint64_t page_ns = flow_link_ns(&s->flow, TARGET_PAGE_SIZE);

    return page_ns * AHEAD_PAGES <= AHEAD_NS ? AHEAD_PAGES :
                                               (uint32_t)(AHEAD_NS / page_ns);
}

/*
 * The next host page to be sent unasked: of the working set, else from the
 * cursor on. `*asked_before` tells which.
 */
static bool next_unasked(struct source *s, struct ram_block **block,
                         uint64_t *host, bool *asked_before)
{
    *asked_before =
        s->stored && !s->ahead &&
        working_set_next(&s->stored->working_set, s->ram, block, host);
    s->ahead -= s->ahead > 0;
    return *asked_before || next_owed(s, block, host);
}

static struct result fill_postcopy(struct source *s, struct batch *batch,
                                   uint64_t most)
{
    struct result r = result_ok();
    struct ram_block *b;
    uint64_t host;
    bool asked_before;

    batch_begin_part(batch, s->section_id);
    if (urgent_take_hint(s)) {
        s->ahead = ahead_pages(s);
    }
    while (RESULT_IS_OK(r) && batch_bytes(batch) < most &&
           next_unasked(s, &b, &host, &asked_before)) {
        if (batch->pages + block_pages_per_host(b) > BATCH_PAGES) {
            break; /* it opens the next batch */
        }
        r = source_check(s, b, host);
        if (RESULT_IS_OK(r)) {
            r = add_owed(s, batch, b, host, asked_before);
        }
    }
    return r;
}

/* Is anything owed that is not here? */
static bool must_await(const struct source *s)
{
    for (uint32_t i = 0; s->arriving && i < s->ram->count; i++) {
        const struct ram_block *b = &s->ram->blocks[i];

        if (next_in_block(s, b, 0) < b->owed.bits) {
            return true;
        }
    }
    return false;
}

static struct result send_owed(struct source *s)
{
    channel_limit_unsent(s->main, POSTCOPY_UNSENT_MAX);
    for (;;) {
        struct result r = pace_turn(s);

        if (RESULT_IS_OK(r)) {
            r = fill_postcopy(s, &s->batch, pace_bytes(s));
        }
        if (RESULT_IS_OK(r) && !s->batch.pages) {
            if (!must_await(s)) {
                break;
            }
            r = pace_wake(s, ARRIVING_LOOK_MS);
            if (RESULT_IS_OK(r)) {
                continue;
            }
        }
        if (RESULT_IS_OK(r)) {
            r = write_part(s, &s->batch, true);
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
        STATS_ADD(s->stats.background_pages, s->batch.pages);
        pace_leave_processors(s);
    }
    /* An urgent page that was claimed is written when the lock is free. */
    channel_lock(source_urgent(s));
    channel_unlock(source_urgent(s));
    return result_ok();
}

struct result pump_postcopy(struct source *s)
{
    struct result r;

    turn_take(TURN_BULK);
    s->begun_ns = clock_ns();
    r = pace_asking(s);
    if (RESULT_IS_OK(r)) {
        r = send_owed(s);
    }
    turn_take(TURN_USUAL);
    return r;
}
