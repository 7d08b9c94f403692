/*
 * Of a parked VM's destination it is found out whether it has a preempt
 * channel, and its guest runs meanwhile.
 */
#include "pumping.h"

/* No page goes along with one so far from the last. */
#define APART 40
#define REQUESTS 7

static void request_apart(struct fixture *f, uint64_t first)
{
    for (uint64_t i = 0; i < REQUESTS; i++) {
        request(f, 1, first + i * APART);
    }
}

static void wait_for_urgent(struct fixture *f, uint64_t pages)
{
    while (__atomic_load_n(&f->source.stats.urgent_pages, __ATOMIC_SEQ_CST) <
           pages) {
    }
}

/* One that asks, of a source that sends next to nothing else. */
static void begin(struct fixture *f, struct job *server)
{
    fixture_open(f, SMALL, false);
    dirty_all(f);
    source_owe_dirty(&f->source);
    source_limit(&f->source, 1);
    job_start(server, run_rpath, &f->source);
}

static void test_urgent_pages_move_over(void)
{
    struct fixture f;
    struct expectation e;
    struct job pump;
    struct job server;

    begin(&f, &server);
    e = expect(&f, true);
    start_readers(&f, true);
    request_apart(&f, 0);
    wait_for_urgent(&f, REQUESTS);
    CHECK_EQ(f.walkers[1].records, 0);
    job_start(&pump, run_postcopy, &f.source);
    source_use_preempt(&f.source, &f.preempt.channel);
    request_apart(&f, APART / 2);
    send_shut(&f);
    CHECK(RESULT_IS_OK(job_wait(&server)));
    source_limit(&f.source, 0);
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    CHECK(finish_readers(&f));
    CHECK(came_exactly_once(&f, &e));
    CHECK_EQ(f.source.stats.urgent_pages, 2 * REQUESTS);
    CHECK_EQ(f.source.stats.urgent_on_preempt, REQUESTS);
    CHECK_EQ(f.walkers[1].records, REQUESTS);
    fixture_close(&f);
}

static void test_its_end_is_seen_then(void)
{
    struct fixture f;
    struct job server;
    struct result r;

    begin(&f, &server);
    source_use_preempt(&f.source, &f.preempt.channel);
    request(&f, 1, 0);
    wait_for_urgent(&f, 1);
    line_hang_up(&f.preempt);
    request(&f, 1, APART); /* it need not look before somebody asks */
    r = job_wait(&server);
    CHECK(r.kind == RESULT_CLOSED || r.kind == RESULT_CHANNEL);
    fixture_close(&f);
}

int main(void)
{
    RUN(test_urgent_pages_move_over);
    RUN(test_its_end_is_seen_then);
    return check_status();
}
