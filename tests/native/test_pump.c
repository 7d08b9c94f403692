#include "rpath.h"

#include "check.h"
#include "support.h"

#include <unistd.h>

#define SECTION 3
#define SHUT 1

enum { SMALL, MIXED };

static const struct block_spec layouts[][2] = {
    [SMALL] = {
        { .idstr = "ram", .length = 8 * MIB, .page_size = PAGE },
        { .idstr = "vga", .length = 300 * PAGE, .page_size = PAGE },
    },
    [MIXED] = {
        { .idstr = "ram", .length = 16 * MIB, .page_size = HUGE,
          .plain = true },
        { .idstr = "vga", .length = 300 * PAGE, .page_size = PAGE },
    },
};

/* A source whose channels are read by walkers. */
struct fixture {
    struct guest guest;
    struct source source;
    struct line main;
    struct line preempt;
    struct walker walkers[2];
    struct job readers[2];
};

static uint64_t seed_of(uint32_t block, uint64_t page)
{
    return (uint64_t)(block + 1) << 32 | page;
}

/* Two of three pages hold data, one is zero; every 16th group is a hole. */
static bool has_data(uint64_t page)
{
    return page / 64 % 16 != 7 && page % 3 != 2;
}

static void fill_guest(struct guest *g)
{
    for (uint32_t i = 0; i < g->ram.count; i++) {
        for (uint64_t p = 0; p < block_pages(&g->ram.blocks[i]); p++) {
            uint8_t *at = g->memory[i] + p * PAGE;

            if (has_data(p)) {
                pattern_fill(at, seed_of(i, p));
            } else if (p / 64 % 16 != 7) {
                memset(at, 0, PAGE);
            }
        }
    }
}

static void fixture_open(struct fixture *f, int layout, bool preempt)
{
    guest_open(&f->guest, layouts[layout], 2);
    fill_guest(&f->guest);
    NEED(RESULT_IS_OK(ram_prepare_source(&f->guest.ram)));
    NEED(RESULT_IS_OK(source_open(&f->source, &f->guest.ram, SECTION)));
    line_open(&f->main);
    line_open(&f->preempt);
    source_connect(&f->source, &f->main.channel,
                   preempt ? &f->preempt.channel : &f->main.channel);
    walker_open(&f->walkers[0], f->main.peer, &f->guest.ram, SECTION);
    f->walkers[0].asker = &f->source;
    walker_share(&f->walkers[1], &f->walkers[0], f->preempt.peer);
}

static void start_readers(struct fixture *f, bool postcopy)
{
    for (int i = 0; i < 2; i++) {
        f->walkers[i].whole_hosts = postcopy;
        job_start(&f->readers[i], walker_run, &f->walkers[i]);
    }
}

/* The streams end; were they well formed? */
static bool finish_readers(struct fixture *f)
{
    line_finish(&f->main);
    line_finish(&f->preempt);
    return (int)RESULT_IS_OK(job_wait(&f->readers[0])) &
           (int)RESULT_IS_OK(job_wait(&f->readers[1]));
}

static void fixture_close(struct fixture *f)
{
    walker_close(&f->walkers[0]);
    line_close(&f->main);
    line_close(&f->preempt);
    source_close(&f->source);
    guest_close(&f->guest);
}

static struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

static void dirty_all(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        bitmap_set_range(&block(f, i)->dirty, 0, block(f, i)->dirty.bits);
    }
}

/* About one page in `n`; returns how many. */
static uint64_t dirty_some(struct fixture *f, uint64_t n)
{
    uint64_t random = 7;

    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(f, i)); p++) {
            if (next_random(&random) % n == 0) {
                bitmap_test_and_set(&block(f, i)->dirty, p);
            }
        }
    }
    return source_dirty_pages(&f->source);
}

/* Which pages came, against a copy of the bitmap that said which shall. */
struct expectation {
    bool *pages[2];
};

static struct expectation expect(struct fixture *f, bool owed)
{
    struct expectation e;

    for (uint32_t i = 0; i < 2; i++) {
        const struct ram_block *b = block(f, i);

        e.pages[i] = calloc(block_pages(b), sizeof(bool));
        NEED(e.pages[i]);
        for (uint64_t p = 0; p < block_pages(b); p++) {
            e.pages[i][p] =
                owed ? bitmap_test(&b->owed, p >> block_pages_bits(b)) :
                       bitmap_test(&b->dirty, p);
        }
    }
    return e;
}

static bool page_came(struct fixture *f, uint32_t i, uint64_t p, bool wanted)
{
    uint32_t count = f->walkers[0].counts[i][p];
    const uint8_t *image = f->walkers[0].images[i] + p * PAGE;

    if (count != (wanted ? 1 : 0)) {
        fprintf(stderr, "block %u page %lu came %u times\n", i,
                (unsigned long)p, count);
        return false;
    }
    return !count || (has_data(p) ? pattern_is(image, seed_of(i, p)) :
                                    is_all_zero(image));
}

/* Each expected page once, with its contents, and no other. */
static bool came_exactly_once(struct fixture *f, struct expectation *e)
{
    bool ok = true;

    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; ok && p < block_pages(block(f, i)); p++) {
            ok = page_came(f, i, p, e->pages[i][p]);
        }
        free(e->pages[i]);
    }
    return ok;
}

/* --- precopy ------------------------------------------------------------- */

static void precopy(int layout, uint64_t one_in)
{
    struct fixture f;
    struct expectation e;
    uint64_t pages;

    fixture_open(&f, layout, false);
    pages = dirty_some(&f, one_in);
    CHECK(pages > 0);
    e = expect(&f, false);
    start_readers(&f, false);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    CHECK_EQ(source_dirty_pages(&f.source), 0);
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    CHECK_EQ(f.walkers[0].records, pages);
    CHECK_EQ(f.source.stats.normal_pages + f.source.stats.zero_pages, pages);
    CHECK_EQ(f.source.stats.background_pages, 0);
    fixture_close(&f);
}

static void test_precopy_sends_what_is_dirty_once(void)
{
    precopy(SMALL, 1);
    precopy(SMALL, 5);
    precopy(SMALL, 700);
    precopy(MIXED, 1);
    precopy(MIXED, 60);
}

static void test_precopy_with_nothing_dirty(void)
{
    struct fixture f;

    fixture_open(&f, SMALL, false);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    CHECK(!is_readable(f.main.peer));
    fixture_close(&f);
}

/* Holes are sent as zero pages, and are holes afterwards. */
static void test_holes_stay_holes(void)
{
    struct fixture f;
    struct expectation e;
    uint64_t before;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    e = expect(&f, false);
    before = guest_allocated(&f.guest, 0);
    CHECK(before > 0);
    CHECK(before < 8 * MIB);
    start_readers(&f, false);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    CHECK_EQ(guest_allocated(&f.guest, 0), before);
    CHECK_EQ(f.source.stats.hole_pages, 8 * MIB / PAGE - before / PAGE);
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    fixture_close(&f);
}

/* A page that becomes dirty behind the pump's back is the next pass's. */
static void test_second_pass(void)
{
    struct fixture f;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    start_readers(&f, false);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    /* A hole of the first pass holds data in the second. */
    CHECK(!has_data(7 * 64));
    pattern_fill(f.guest.memory[0] + 7 * 64 * PAGE, 99);
    bitmap_test_and_set(&block(&f, 0)->dirty, 7 * 64);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    CHECK(finish_readers(&f));
    CHECK_EQ(f.walkers[0].counts[0][7 * 64], 2);
    CHECK_EQ(f.walkers[0].counts[0][7 * 64 + 1], 1);
    CHECK(pattern_is(f.walkers[0].images[0] + 7 * 64 * PAGE, 99));
    fixture_close(&f);
}

static void test_yield_before_the_pass(void)
{
    struct fixture f;
    struct result r;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_yield(&f.source, true);
    r = pump_precopy(&f.source);
    CHECK_EQ(r.kind, RESULT_STOPPED);
    CHECK_TEXT(r.what, "yield");
    CHECK(!is_readable(f.main.peer));
    source_yield(&f.source, false);
    start_readers(&f, false);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    CHECK(finish_readers(&f));
    fixture_close(&f);
}

static struct result run_precopy(void *arg)
{
    return pump_precopy(arg);
}

static void wait_for_records(struct walker *w, uint64_t records)
{
    while (__atomic_load_n(&w->records, __ATOMIC_SEQ_CST) < records) {
    }
}

/* The pump waits out its limit; a yield, a stop, a new limit reach it there. */
static void limited(void (*change)(struct fixture *f), struct result wanted)
{
    struct fixture f;
    struct job job;
    struct result r;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_limit(&f.source, 1);
    start_readers(&f, false);
    job_start(&job, run_precopy, &f.source);
    wait_for_records(&f.walkers[0], 1);
    change(&f);
    r = job_wait(&job);
    CHECK_EQ(r.kind, wanted.kind);
    CHECK_TEXT(r.what, wanted.what);
    CHECK(finish_readers(&f));
    fixture_close(&f);
}

static void yield_now(struct fixture *f)
{
    source_yield(&f->source, true);
}

static void stop_now(struct fixture *f)
{
    set_event(f->main.stop_fd);
}

static void lift_limit(struct fixture *f)
{
    source_limit(&f->source, 0);
}

static void test_changes_while_limited(void)
{
    limited(yield_now, result_of(RESULT_STOPPED, "yield"));
    limited(stop_now, result_of(RESULT_STOPPED, "stopped"));
    limited(lift_limit, result_ok());
}

/* What yield cut short is still dirty: nothing is lost and nothing doubled. */
static void test_yield_in_the_middle(void)
{
    struct fixture f;
    struct expectation e;
    struct job job;
    uint64_t left;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    e = expect(&f, false);
    source_limit(&f.source, 1);
    start_readers(&f, false);
    job_start(&job, run_precopy, &f.source);
    wait_for_records(&f.walkers[0], 1);
    source_yield(&f.source, true);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    left = source_dirty_pages(&f.source);
    CHECK(left > 0 && left < block_pages(block(&f, 0)) + 300);
    source_yield(&f.source, false);
    source_limit(&f.source, 0);
    CHECK(RESULT_IS_OK(pump_precopy(&f.source)));
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    fixture_close(&f);
}

static void test_stop_while_writing(void)
{
    struct fixture f;
    struct job job;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    /* Nobody reads: more is dirty than the socket holds. */
    job_start(&job, run_precopy, &f.source);
    while (!is_readable(f.main.peer)) {
    }
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    fixture_close(&f);
}

static void test_peer_goes_while_writing(void)
{
    struct fixture f;
    struct job job;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    job_start(&job, run_precopy, &f.source);
    while (!is_readable(f.main.peer)) {
    }
    line_hang_up(&f.main);
    CHECK_EQ(job_wait(&job).kind, RESULT_CHANNEL);
    fixture_close(&f);
}

/* --- postcopy ------------------------------------------------------------ */

static void test_owe_rounds_to_host_pages(void)
{
    struct fixture f;

    fixture_open(&f, MIXED, false);
    bitmap_test_and_set(&block(&f, 0)->dirty, 511);
    bitmap_test_and_set(&block(&f, 0)->dirty, 512);
    bitmap_test_and_set(&block(&f, 0)->dirty, 8 * 512 - 1);
    bitmap_test_and_set(&block(&f, 1)->dirty, 299);
    CHECK_EQ(source_owe_dirty(&f.source), 3 * 512 + 1);
    CHECK_EQ(bitmap_count(&block(&f, 0)->owed), 3);
    CHECK(bitmap_test(&block(&f, 0)->owed, 0));
    CHECK(bitmap_test(&block(&f, 0)->owed, 1));
    CHECK(bitmap_test(&block(&f, 0)->owed, 7));
    CHECK(bitmap_test(&block(&f, 1)->owed, 299));
    fixture_close(&f);
}

/* A destination may insist on at least one discard. */
static void test_owe_at_least_one(void)
{
    struct fixture f;

    fixture_open(&f, MIXED, false);
    CHECK_EQ(source_owe_dirty(&f.source), 512);
    CHECK(bitmap_test(&block(&f, 0)->owed, 0));
    fixture_close(&f);
}

/* Of a received bitmap the rest is owed, and nothing that was before. */
static void test_owe_missing(void)
{
    struct fixture f;
    uint8_t received[8 * 512 / 8] = { 0 };

    fixture_open(&f, MIXED, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    memset(received, 0xff, sizeof(received));
    received[512 / 8] = 0xfe; /* a part of the second host page */
    received[sizeof(received) - 1] = 0x7f;
    source_owe_missing(block(&f, 0), received);
    CHECK_EQ(bitmap_count(&block(&f, 0)->owed), 2);
    CHECK(bitmap_test(&block(&f, 0)->owed, 1));
    CHECK(bitmap_test(&block(&f, 0)->owed, 7));
    memset(received, 0, sizeof(received));
    received[299 / 8] = 1 << (299 % 8);
    source_owe_missing(block(&f, 1), received);
    CHECK_EQ(bitmap_count(&block(&f, 1)->owed), 299);
    CHECK(!bitmap_test(&block(&f, 1)->owed, 299));
    fixture_close(&f);
}

/* Every owed range is in a discard, in order, and many make several. */
static void test_discards(void)
{
    struct fixture f;
    struct ram_block *b;
    uint64_t next = 0;
    uint64_t ranges = 0;

    fixture_open(&f, SMALL, false);
    b = block(&f, 0);
    for (uint64_t p = 0; p < 1000; p += 2) {
        bitmap_test_and_set(&b->owed, p);
    }
    bitmap_set_range(&b->owed, 1500, 548);
    bitmap_test_and_set(&block(&f, 1)->owed, 299);
    CHECK(RESULT_IS_OK(pump_discards(&f.source)));
    while (ranges < 501) {
        uint8_t head[11];
        uint64_t count;

        receive_all(f.main.peer, head, sizeof(head));
        CHECK_BYTES(head, "\x08\0\6", 3);
        CHECK_BYTES(head + 5, "\0\3ram\0", 6);
        count = (wire_get_be16(head + 3) - 6u) / 16;
        CHECK(count > 0 && count <= DISCARD_RANGES);
        for (uint64_t i = 0; i < count; i++, ranges++) {
            uint8_t range[16];

            receive_all(f.main.peer, range, sizeof(range));
            CHECK_EQ(wire_get_be64(range), next * PAGE);
            CHECK_EQ(wire_get_be64(range + 8),
                     next == 1500 ? 548 * PAGE : PAGE);
            next = next == 998 ? 1500 : next + 2;
        }
    }
    {
        static const uint8_t last[] = {
            8, 0, 6,    0,    22, 0, 3, 'v', 'g', 'a', 0, 0,    0, 0,
            0, 0, 0x12, 0xb0, 0,  0, 0, 0,   0,   0,   0, 0x10, 0,
        };
        uint8_t got[sizeof(last)];

        receive_all(f.main.peer, got, sizeof(got));
        CHECK_BYTES(got, last, sizeof(last));
    }
    CHECK(!is_readable(f.main.peer));
    fixture_close(&f);
}

static struct result run_postcopy(void *arg)
{
    return pump_postcopy(arg);
}

static struct result run_rpath(void *arg)
{
    struct rp_message m;

    return rpath_run(arg, &m);
}

static void request(struct fixture *f, uint32_t i, uint64_t host)
{
    const struct ram_block *b = block(f, i);
    struct script s = { 0 };

    put_be16(&s, 3);
    put_be16(&s, (uint16_t)(13 + b->idstr_length));
    put_be64(&s, host << b->host_bits);
    put_be32(&s, (uint32_t)b->page_size);
    put_name(&s, b->idstr);
    send_all(f->main.peer, s.bytes, s.size);
    script_free(&s);
}

static void send_shut(struct fixture *f)
{
    static const uint8_t shut[] = { 0, SHUT, 0, 4, 0, 0, 0, 0 };

    send_all(f->main.peer, shut, sizeof(shut));
}

static void request_some(struct fixture *f, uint64_t *random, int count)
{
    while (count--) {
        uint32_t i = next_random(random) % 4 == 0;

        request(f, i, next_random(random) % block_hosts(block(f, i)));
    }
}

static void send_end(struct fixture *f)
{
    struct script s = { 0 };

    put_section(&s, 3, SECTION);
    put_end_of_section(&s, SECTION);
    NEED(RESULT_IS_OK(channel_write(&f->main.channel, s.bytes, s.size)));
    script_free(&s);
}

/*
 * Requests before and during the background stream: each owed page comes once,
 * host pages whole, and END after the last.
 */
static void postcopy(int layout, bool preempt, uint64_t one_in)
{
    struct fixture f;
    struct expectation e;
    struct job pump;
    struct job server;
    uint64_t random = 1;
    uint64_t owed;

    fixture_open(&f, layout, preempt);
    dirty_some(&f, one_in);
    bitmap_test_and_set(&block(&f, 1)->dirty, 150);
    owed = source_owe_dirty(&f.source);
    e = expect(&f, true);
    start_readers(&f, true);

    job_start(&server, run_rpath, &f.source);
    request(&f, 1, bitmap_next_set(&block(&f, 1)->owed, 0));
    request_some(&f, &random, 20);
    send_shut(&f);
    CHECK(RESULT_IS_OK(job_wait(&server)));
    CHECK_EQ(f.source.stats.requests, 21);
    CHECK(f.source.stats.urgent_pages > 0);

    job_start(&server, run_rpath, &f.source);
    job_start(&pump, run_postcopy, &f.source);
    request_some(&f, &random, 300);
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    CHECK_EQ(source_owed_pages(&f.source), 0);
    send_end(&f);
    request_some(&f, &random, 10); /* late: no answer, no error */
    send_shut(&f);
    CHECK(RESULT_IS_OK(job_wait(&server)));

    CHECK(finish_readers(&f));
    CHECK_EQ(f.walkers[0].ends, 1);
    CHECK(came_exactly_once(&f, &e));
    CHECK_EQ(f.walkers[0].records + f.walkers[1].records, owed);
    CHECK_EQ(f.source.stats.urgent_pages + f.source.stats.background_pages,
             owed);
    CHECK_EQ(f.source.stats.normal_pages + f.source.stats.zero_pages, owed);
    CHECK_EQ(f.source.stats.urgent_on_preempt,
             preempt ? f.source.stats.urgent_pages : 0);
    CHECK_EQ(f.walkers[1].records, f.source.stats.urgent_on_preempt);
    CHECK_EQ(f.source.stats.requests, 331);
    CHECK_EQ(f.source.stats.send.count + f.source.stats.requests_late, 331);
    CHECK(f.source.stats.requests_late >= 10);
    fixture_close(&f);
}

static void test_postcopy_on_main(void)
{
    postcopy(SMALL, false, 1);
    postcopy(SMALL, false, 3);
}

static void test_postcopy_on_preempt(void)
{
    postcopy(SMALL, true, 1);
    postcopy(SMALL, true, 3);
}

static void test_postcopy_huge_on_main(void)
{
    postcopy(MIXED, false, 1);
    postcopy(MIXED, false, 800);
}

static void test_postcopy_huge_on_preempt(void)
{
    postcopy(MIXED, true, 1);
    postcopy(MIXED, true, 800);
}

/* The limit is for the background; requests are served beside it. */
static void urgent_beside_limit(bool preempt)
{
    struct fixture f;
    struct expectation e;
    struct job pump;
    struct job server;

    fixture_open(&f, SMALL, preempt);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    e = expect(&f, true);
    source_limit(&f.source, 1);
    start_readers(&f, true);
    job_start(&server, run_rpath, &f.source);
    job_start(&pump, run_postcopy, &f.source);
    wait_for_records(&f.walkers[0], 1);
    for (uint64_t p = 0; p < 300; p++) {
        request(&f, 1, p);
    }
    send_shut(&f);
    CHECK(RESULT_IS_OK(job_wait(&server)));
    CHECK_EQ(bitmap_count(&block(&f, 1)->owed), 0);
    CHECK(bitmap_count(&block(&f, 0)->owed) > 0);
    source_limit(&f.source, 0);
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    fixture_close(&f);
}

static void test_urgent_beside_limit(void)
{
    urgent_beside_limit(false);
    urgent_beside_limit(true);
}

/* Without a preempt channel the scan goes on behind the request. */
static void test_scan_follows_request(void)
{
    struct fixture f;
    struct rp_message m;
    struct job pump;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    start_readers(&f, true);
    request(&f, 1, 200);
    send_shut(&f);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    source_limit(&f.source, 1);
    job_start(&pump, run_postcopy, &f.source);
    wait_for_records(&f.walkers[0], 2);
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    CHECK(finish_readers(&f));
    CHECK_EQ(f.walkers[0].records, 2);
    CHECK_EQ(f.walkers[0].counts[1][200], 1);
    CHECK_EQ(f.walkers[0].counts[1][201], 1);
    fixture_close(&f);
}

/* What is not asked for waits for its time, although nothing limits it. */
static void test_only_asked(void)
{
    struct fixture f;
    struct job pump;
    struct job server;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    f.source.only_asked_ns = UINT64_MAX / 2;
    start_readers(&f, true);
    job_start(&server, run_rpath, &f.source);
    job_start(&pump, run_postcopy, &f.source);
    for (uint64_t p = 0; p < 300; p++) {
        request(&f, 1, p);
    }
    wait_for_records(&f.walkers[0], 300);
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    CHECK_EQ(job_wait(&server).kind, RESULT_STOPPED);
    CHECK_EQ(f.source.stats.background_pages, 0);
    CHECK_EQ(f.source.stats.urgent_pages, 300);
    CHECK(finish_readers(&f));
    fixture_close(&f);
}

static void test_only_asked_ends(void)
{
    struct fixture f;
    struct expectation e;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    e = expect(&f, true);
    f.source.only_asked_ns = 1000000;
    start_readers(&f, true);
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    fixture_close(&f);
}

/* Over a link on which a page takes 8 ms; requests come until they are over. */
static void link_is_left(bool requests)
{
    struct fixture f;
    struct expectation e;
    struct job pump;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    e = expect(&f, true);
    f.source.flow.mib_ns = UINT64_C(2000000000);
    f.source.served_ns = requests ? UINT64_MAX : 0;
    start_readers(&f, true);
    job_start(&pump, run_postcopy, &f.source);
    while (requests && !__atomic_load_n(&f.source.stats.background_pauses,
                                        __ATOMIC_SEQ_CST)) {
    }
    __atomic_store_n(&f.source.served_ns, 0, __ATOMIC_SEQ_CST);
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    CHECK_EQ(f.source.stats.background_pauses > 0, requests);
    fixture_close(&f);
}

static void test_link_is_left_to_requests(void)
{
    link_is_left(false);
    link_is_left(true);
}

static void test_preempt_closed_early(void)
{
    struct fixture f;
    struct job pump;
    struct job server;
    struct result r;

    fixture_open(&f, SMALL, true);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    source_limit(&f.source, 1);
    job_start(&pump, run_postcopy, &f.source);
    job_start(&server, run_rpath, &f.source);
    line_hang_up(&f.preempt);
    r = job_wait(&server);
    CHECK_EQ(r.kind, RESULT_CLOSED);
    CHECK_TEXT(r.what, "preempt channel");
    /* The owner of the loops then stops the other one. */
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    fixture_close(&f);
}

static void test_postcopy_stopped(void)
{
    struct fixture f;
    struct job pump;

    fixture_open(&f, SMALL, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    job_start(&pump, run_postcopy, &f.source);
    while (!is_readable(f.main.peer)) {
    }
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    CHECK(source_owed_pages(&f.source) > 0);
    fixture_close(&f);
}

/* A new connection: the destination said what it has, the rest is owed. */
static void test_second_epoch(void)
{
    struct fixture f;
    struct expectation e;
    struct job pump;

    fixture_open(&f, MIXED, false);
    dirty_all(&f);
    source_owe_dirty(&f.source);
    job_start(&pump, run_postcopy, &f.source);
    while (!is_readable(f.main.peer)) {
    }
    line_hang_up(&f.main);
    CHECK_EQ(job_wait(&pump).kind, RESULT_CHANNEL);

    line_close(&f.main);
    line_open(&f.main);
    f.walkers[0].fd = f.main.peer;
    source_connect(&f.source, &f.main.channel, &f.main.channel);
    bitmap_set_range(&block(&f, 0)->owed, 3, 5);
    bitmap_set_range(&block(&f, 1)->owed, 100, 20);
    e = expect(&f, true);
    start_readers(&f, true);
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    fixture_close(&f);
}

int main(void)
{
    RUN(test_precopy_sends_what_is_dirty_once);
    RUN(test_precopy_with_nothing_dirty);
    RUN(test_holes_stay_holes);
    RUN(test_second_pass);
    RUN(test_yield_before_the_pass);
    RUN(test_changes_while_limited);
    RUN(test_yield_in_the_middle);
    RUN(test_stop_while_writing);
    RUN(test_peer_goes_while_writing);
    RUN(test_owe_rounds_to_host_pages);
    RUN(test_owe_at_least_one);
    RUN(test_owe_missing);
    RUN(test_discards);
    RUN(test_postcopy_on_main);
    RUN(test_postcopy_on_preempt);
    RUN(test_postcopy_huge_on_main);
    RUN(test_postcopy_huge_on_preempt);
    RUN(test_urgent_beside_limit);
    RUN(test_scan_follows_request);
    RUN(test_only_asked);
    RUN(test_only_asked_ends);
    RUN(test_link_is_left_to_requests);
    RUN(test_preempt_closed_early);
    RUN(test_postcopy_stopped);
    RUN(test_second_epoch);
    return check_status();
}
