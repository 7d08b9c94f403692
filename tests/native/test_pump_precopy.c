#include "pumping.h"

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
    return check_status();
}
