#include "pumping.h"

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
