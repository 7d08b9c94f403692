#include "stats.h"

#include "check.h"
#include "support.h"

static void test_empty(void)
{
    static struct histogram h;

    CHECK_EQ(histogram_percentile(&h, 0), 0);
    CHECK_EQ(histogram_percentile(&h, 500), 0);
    CHECK_EQ(histogram_percentile(&h, 1000), 0);
}

/* A single value is every percentile, whatever its size. */
static void test_one_value(void)
{
    for (unsigned bit = 0; bit < 64; bit++) {
        for (int near = -1; near <= 1; near++) {
            uint64_t value = (UINT64_C(1) << bit) + (uint64_t)near;
            static struct histogram h;

            memset(&h, 0, sizeof(h));
            histogram_add(&h, value);
            CHECK_EQ(histogram_percentile(&h, 1), value);
            CHECK_EQ(histogram_percentile(&h, 1000), value);
            CHECK_EQ(h.max_ns, value);
            CHECK_EQ(h.sum_ns, value);
        }
    }
}

/* Never too low, and at most 1/16 too high. */
static void test_percentile_error(void)
{
    for (uint64_t value = 1; value < UINT64_C(1) << 62;
         value += 1 + value / 7) {
        static struct histogram h;
        uint64_t read;

        memset(&h, 0, sizeof(h));
        histogram_add(&h, value);
        histogram_add(&h, UINT64_MAX);
        read = histogram_percentile(&h, 500);
        CHECK(read >= value);
        CHECK(read - value <= value / 16 + 1);
        CHECK_EQ(histogram_percentile(&h, 1000), UINT64_MAX);
    }
}

static void test_percentiles_of_many(void)
{
    static struct histogram h;

    for (uint64_t i = 1; i <= 1000; i++) {
        histogram_add(&h, i * 1000);
    }
    CHECK_EQ(h.count, 1000);
    CHECK_EQ(h.sum_ns, 500500000);
    for (unsigned permille = 1; permille <= 1000; permille++) {
        uint64_t exact = UINT64_C(1000) * permille;
        uint64_t read = histogram_percentile(&h, permille);

        CHECK(read >= exact);
        CHECK(read <= exact + exact / 16 + 1);
    }
    CHECK_EQ(histogram_percentile(&h, 1000), 1000000);
}

static void test_between(void)
{
    static struct histogram h;
    uint64_t sum = 0;

    for (uint64_t us = 1; us <= 1u << 20; us *= 2) {
        /* Well inside: bucket edges are no whole microseconds. */
        histogram_add(&h, us * 1500);
    }
    for (uint64_t us = 1; us <= 1u << 20; us *= 2) {
        CHECK_EQ(histogram_between_us(&h, us, 2 * us), 1);
        sum += histogram_between_us(&h, us, 2 * us);
    }
    CHECK_EQ(sum, h.count);
    CHECK_EQ(histogram_between_us(&h, 0, 1), 0);
    CHECK_EQ(histogram_between_us(&h, 0, UINT64_MAX), h.count);
}

static struct result add_values(void *arg)
{
    for (uint64_t i = 0; i < 5000; i++) {
        histogram_add(arg, i);
    }
    return result_ok();
}

static void test_several_threads(void)
{
    static struct histogram h;
    struct job jobs[3];

    for (size_t i = 0; i < 3; i++) {
        job_start(&jobs[i], add_values, &h);
    }
    (void)histogram_percentile(&h, 999);
    for (size_t i = 0; i < 3; i++) {
        job_wait(&jobs[i]);
    }
    CHECK_EQ(h.count, 15000);
    CHECK_EQ(h.max_ns, 4999);
    CHECK_EQ(h.sum_ns, 3 * 4999 * 2500);
}

int main(void)
{
    RUN(test_empty);
    RUN(test_one_value);
    RUN(test_percentile_error);
    RUN(test_percentiles_of_many);
    RUN(test_between);
    RUN(test_several_threads);
    return check_status();
}
