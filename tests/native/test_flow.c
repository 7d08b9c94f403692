#include "flow.h"

#include "check.h"
#include "support.h"

#define US UINT64_C(1000)
#define MS (1000 * US)
#define SECOND (1000 * MS)
#define PIECE ((uint64_t)4 << 10)

/*
 * A line with a constant rate and a buffer without a bound: what is sent waits
 * for what was sent before it, and an answer takes `way_ns` besides.
 */
struct path {
    struct flow flow;
    uint64_t way_ns;
    uint64_t bytes_per_ms;
    uint64_t now_ns;
    uint64_t free_ns; /* when the line has carried all it was given */
    struct {
        uint32_t number;
        uint64_t at_ns;
    } answers[FLOW_MARKS];
    unsigned first, count;
    uint64_t carried;
    uint64_t queue_ns; /* the longest anything waited since it was reset */
};

static void path_open(struct path *l, uint64_t way_ns, uint64_t bytes_per_ms)
{
    *l = (struct path){ .way_ns = way_ns,
                        .bytes_per_ms = bytes_per_ms,
                        .now_ns = SECOND };
    flow_open(&l->flow, PIECE);
}

static void carry(struct path *l, uint64_t bytes)
{
    uint64_t wait = l->free_ns > l->now_ns ? l->free_ns - l->now_ns : 0;

    l->free_ns = l->now_ns + wait + bytes * MS / l->bytes_per_ms;
    l->carried += bytes;
    if (wait > l->queue_ns) {
        l->queue_ns = wait;
    }
}

static void will_answer(struct path *l, uint32_t number)
{
    unsigned i = (l->first + l->count++) % FLOW_MARKS;

    l->answers[i].number = number;
    l->answers[i].at_ns =
        (l->free_ns > l->now_ns ? l->free_ns : l->now_ns) + l->way_ns;
}

/* Time passes until the next answer is here; false if none is to come. */
static bool next_answer(struct path *l)
{
    if (!l->count) {
        return false;
    }
    if (l->answers[l->first].at_ns > l->now_ns) {
        l->now_ns = l->answers[l->first].at_ns;
    }
    NEED(flow_answer_untrusted(&l->flow, l->answers[l->first].number,
                               l->now_ns));
    l->first = (l->first + 1) % FLOW_MARKS;
    l->count--;
    return true;
}

/* A sender that always has something to send. */
static void run(struct path *l, uint64_t until_ns)
{
    uint32_t number;

    while (l->now_ns < until_ns) {
        switch (flow_turn(&l->flow, l->now_ns)) {
        case FLOW_SEND:
            carry(l, PIECE);
            if (flow_send(&l->flow, PIECE, l->now_ns, &number)) {
                will_answer(l, number);
            }
            break;
        case FLOW_PROBE:
            will_answer(l, flow_probe(&l->flow, l->now_ns));
            break;
        case FLOW_WAIT:
            /* Else it waits for an answer that nobody will give. */
            NEED(next_answer(l));
            break;
        }
    }
}

/* Slow and deep: the queue stays short, and the line busy. */
static void test_slow_line(void)
{
    struct path l;
    uint64_t carried;

    path_open(&l, 2 * MS, 12500);
    run(&l, 2 * SECOND);
    l.queue_ns = 0;
    carried = l.carried;
    run(&l, 12 * SECOND);
    CHECK(l.queue_ns < 3 * MS);
    CHECK(l.carried - carried > 10 * 1000 * l.bytes_per_ms / 2);
    flow_close(&l.flow);
}

static void test_fast_line(void)
{
    struct path l;
    uint64_t carried;

    path_open(&l, 60 * US, 2000 * 1000);
    run(&l, 2 * SECOND);
    carried = l.carried;
    run(&l, 12 * SECOND);
    CHECK(l.carried - carried > 10 * 1000 * l.bytes_per_ms * 8 / 10);
    CHECK(flow_base_ns(&l.flow) < 100 * US);
    flow_close(&l.flow);
}

/* Far away: the window grows until the line is full. */
static void test_long_line(void)
{
    struct path l;
    uint64_t carried;

    path_open(&l, 50 * MS, 100 * 1000);
    run(&l, 12 * SECOND);
    carried = l.carried;
    run(&l, 22 * SECOND);
    CHECK(l.carried - carried > 10 * 1000 * l.bytes_per_ms / 2);
    flow_close(&l.flow);
}

/* What a page takes is known, and what the way takes is no part of it. */
static uint64_t page_ns_over(uint64_t way_ns, uint64_t bytes_per_ms)
{
    struct path l;
    uint64_t ns;

    path_open(&l, way_ns, bytes_per_ms);
    NEED(flow_link_ns(&l.flow, PIECE) == 0);
    run(&l, SECOND + 100 * MS);
    ns = flow_link_ns(&l.flow, PIECE);
    flow_restart(&l.flow);
    NEED(flow_link_ns(&l.flow, PIECE) == 0);
    flow_close(&l.flow);
    return ns;
}

static void test_time_of_a_page(void)
{
    uint64_t slow = page_ns_over(100 * US, 12500);
    uint64_t fast = page_ns_over(100 * US, 2000 * 1000);

    CHECK(slow > 200 * US && slow < 330 * US);
    CHECK(fast < 5 * US);
}

/* Another way that is ten times as long: its time is the new base. */
static void test_base_is_measured_again(void)
{
    struct path l;
    uint64_t carried;

    path_open(&l, 1 * MS, 100 * 1000);
    run(&l, 5 * SECOND);
    l.way_ns = 10 * MS;
    run(&l, 10 * SECOND);
    CHECK(flow_base_ns(&l.flow) >= 10 * MS);
    carried = l.carried;
    run(&l, 20 * SECOND);
    CHECK(l.carried - carried > 10 * 1000 * l.bytes_per_ms / 2);
    flow_close(&l.flow);
}

/* A first answer that took long for another reason is corrected at once. */
static void test_base_that_never_was(void)
{
    struct path l;

    path_open(&l, 40 * MS, 12500);
    will_answer(&l, flow_probe(&l.flow, l.now_ns));
    CHECK_EQ(flow_turn(&l.flow, l.now_ns), FLOW_WAIT);
    CHECK(next_answer(&l));
    CHECK_EQ(flow_base_ns(&l.flow), 40 * MS);
    l.way_ns = 2 * MS;
    run(&l, SECOND + SECOND / 4);
    CHECK(flow_base_ns(&l.flow) < 3 * MS);
    flow_close(&l.flow);
}

/* 4 KiB in a millisecond, each mark answered before the next. */
static void run_idly(struct path *l)
{
    uint32_t number;

    for (int i = 0; i < 100000; i++) {
        carry(l, PIECE);
        if (flow_send(&l->flow, PIECE, l->now_ns, &number)) {
            will_answer(l, number);
            next_answer(l);
        }
        l->now_ns += MS;
    }
}

/* Who sends less than it may learns nothing about more. */
static void test_idle_sender_does_not_grow(void)
{
    struct path l;
    uint64_t window;

    path_open(&l, 1 * MS, 100 * 1000);
    run(&l, 5 * SECOND);
    while (next_answer(&l)) {
    }
    run_idly(&l);
    window = flow_window(&l.flow);
    run_idly(&l);
    CHECK_EQ(flow_window(&l.flow), window);
    flow_close(&l.flow);
}

static void test_made_up_answers(void)
{
    struct path l;

    path_open(&l, 1 * MS, 100 * 1000);
    CHECK(!flow_answer_untrusted(&l.flow, 0, l.now_ns));
    run(&l, SECOND + 100 * MS);
    while (next_answer(&l)) {
    }
    for (uint32_t low = 0; low < 0x10000; low++) {
        CHECK(!flow_answer_untrusted(&l.flow, low, l.now_ns));
    }
    flow_close(&l.flow);
}

/* Old marks' answers say nothing about a new connection. */
static void test_new_connection(void)
{
    struct path l;
    uint32_t old;

    path_open(&l, 1 * MS, 100 * 1000);
    old = flow_probe(&l.flow, l.now_ns);
    flow_restart(&l.flow);
    CHECK(!flow_answer_untrusted(&l.flow, old, l.now_ns));
    CHECK_EQ(flow_turn(&l.flow, l.now_ns), FLOW_PROBE);
    CHECK(flow_answer_untrusted(&l.flow, flow_probe(&l.flow, l.now_ns) & 0xffff,
                                l.now_ns + MS));
    CHECK_EQ(flow_base_ns(&l.flow), MS);
    flow_close(&l.flow);
}

/* Behind pages that no mark followed a probe only makes sure they arrive. */
static void test_probe_behind_pages(void)
{
    struct path l;
    uint32_t number;

    path_open(&l, 1 * MS, 100 * 1000);
    CHECK(!flow_send(&l.flow, PIECE, l.now_ns, &number));
    number = flow_probe(&l.flow, l.now_ns);
    CHECK(flow_answer_untrusted(&l.flow, number, l.now_ns + MS));
    CHECK_EQ(flow_turn(&l.flow, l.now_ns + MS), FLOW_PROBE);
    number = flow_probe(&l.flow, l.now_ns + MS);
    CHECK(flow_answer_untrusted(&l.flow, number, l.now_ns + 2 * MS));
    CHECK_EQ(flow_turn(&l.flow, l.now_ns + 2 * MS), FLOW_SEND);
    flow_close(&l.flow);
}

int main(void)
{
    RUN(test_slow_line);
    RUN(test_fast_line);
    RUN(test_long_line);
    RUN(test_time_of_a_page);
    RUN(test_base_is_measured_again);
    RUN(test_base_that_never_was);
    RUN(test_idle_sender_does_not_grow);
    RUN(test_probe_behind_pages);
    RUN(test_made_up_answers);
    RUN(test_new_connection);
    return check_status();
}
