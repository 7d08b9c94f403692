#include "limit.h"

#include "check.h"
#include "support.h"

#include <time.h>

#define MS UINT64_C(1000000)
#define BURST_MS 5

/*
 * Time is moved by moving `last_ns`, and the clock is read before and after:
 * the answer must lie between what either would give.
 */
static void test_debt_is_time(void)
{
    struct limit l = { 0 };

    limit_set(&l, 1000000); /* 1000 bytes a millisecond */
    for (uint64_t debt = 1; debt <= 90; debt++) {
        uint64_t before = clock_ns();
        uint64_t ns;
        uint64_t passed;

        l.credit = -(int64_t)debt * 1000;
        l.last_ns = before;
        ns = limit_wait_ns(&l);
        passed = clock_ns() - before;
        CHECK(ns <= debt * MS + 1);
        CHECK(ns + passed + 1000 >= debt * MS);
    }
}

static void test_naps_are_short(void)
{
    struct limit l = { .credit = -1000000000 };

    limit_set(&l, 1000);
    CHECK_EQ(limit_wait_ns(&l), LIMIT_NAP_NS);
}

static void test_unlimited(void)
{
    struct limit l = { 0 };

    limit_take(&l, UINT64_C(1) << 40);
    CHECK_EQ(limit_wait_ns(&l), 0);
    /* The debt of unlimited times is not held against us later. */
    limit_set(&l, 1000000);
    CHECK_EQ(limit_wait_ns(&l), 0);
}

static void test_idle_time_is_a_short_burst(void)
{
    struct limit l = { 0 };

    limit_set(&l, 1000000);
    limit_take(&l, 0);
    l.last_ns -= 900 * MS;
    limit_take(&l, 0);
    CHECK_EQ(l.credit, BURST_MS * 1000);
}

/* So slow that less than a byte becomes free between two looks. */
static void test_slow_rates_get_on(void)
{
    struct limit l = { 0 };

    limit_set(&l, 5);
    limit_take(&l, 2);
    for (int look = 0; look < 40; look++) {
        CHECK(l.last_ns);
        l.last_ns -= 20 * MS;
        if (limit_wait_ns(&l) == 0) {
            return;
        }
    }
    CHECK(!"two bytes at 5 bytes per second did not fit in 0.8 seconds");
}

static void test_extremes(void)
{
    struct limit l = { 0 };

    limit_set(&l, UINT64_MAX);
    limit_take(&l, INT64_MAX / 4);
    l.last_ns -= 10000 * MS;
    CHECK_EQ(limit_wait_ns(&l), 0);
    limit_set(&l, 1);
    limit_take(&l, INT64_MAX / 4);
    CHECK(limit_wait_ns(&l) > 0);
}

/* Over a tenth of a second of real time no more than allowed gets through. */
static void test_real_time(void)
{
    const uint64_t rate = 20000000;
    struct limit l = { 0 };
    uint64_t start = clock_ns();
    uint64_t sent = 0;
    uint64_t passed;

    limit_set(&l, rate);
    while (sent < rate / 10) {
        uint64_t ns = limit_wait_ns(&l);
        struct timespec nap = { .tv_nsec = (long)ns };

        if (ns) {
            clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL);
            continue;
        }
        limit_take(&l, 20000);
        sent += 20000;
    }
    passed = clock_ns() - start;
    /* The last piece may be debt still. */
    CHECK(sent - 20000 <= rate / 1000 * (passed / MS + 1 + BURST_MS));
}

static struct result change_rate(void *arg)
{
    for (uint64_t i = 1; i <= 2000; i++) {
        limit_set(arg, i * 1000000);
    }
    limit_set(arg, 0);
    return result_ok();
}

static void test_rate_changes_meanwhile(void)
{
    struct limit l = { 0 };
    struct job job;

    limit_set(&l, 1000);
    limit_take(&l, 1000000);
    job_start(&job, change_rate, &l);
    while (limit_wait_ns(&l)) {
        limit_take(&l, 1);
    }
    job_wait(&job);
    CHECK_EQ(limit_wait_ns(&l), 0);
}

int main(void)
{
    RUN(test_debt_is_time);
    RUN(test_naps_are_short);
    RUN(test_unlimited);
    RUN(test_idle_time_is_a_short_burst);
    RUN(test_slow_rates_get_on);
    RUN(test_extremes);
    RUN(test_real_time);
    RUN(test_rate_changes_meanwhile);
    return check_status();
}
