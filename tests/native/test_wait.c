#include "wait.h"

#include "check.h"
#include "limit.h"
#include "support.h"

#define MS UINT64_C(1000000)

static const struct ram_block block = { .idstr = "ram" };
static const struct ram_block other = { .idstr = "rom" };
static struct waiting w;

static void open_waiting(uint32_t vcpus)
{
    static uint32_t threads[VCPUS_MAX + 1];

    for (uint32_t i = 0; i <= VCPUS_MAX; i++) {
        threads[i] = 1000 + i;
    }
    waiting_open(&w, threads, vcpus);
}

/* Let `ms` pass for everyone who waits, without waiting ourselves. */
static void pass(uint64_t ms)
{
    for (uint32_t i = 0; i < w.count; i++) {
        w.waiters[i].since_ns -= ms * MS;
    }
    w.all_blocked_since_ns -= ms * MS;
}

/* The real clock runs, too: never less, and less than a second more. */
static bool about(uint64_t ns, uint64_t ms)
{
    return ns >= ms * MS && ns < (ms + 1000) * MS;
}

/* Numbers of different orders, so that one cannot stand in for another. */
static void test_one_vcpu(void)
{
    open_waiting(1);
    waiting_begin(&w, 1000, &block, 7);
    CHECK_EQ(w.count, 1);
    CHECK_EQ(w.vcpus[0].blocked, 1);
    pass(10000);
    waiting_end(&w, &block, 6, 1, NULL);
    waiting_end(&w, &block, 8, 100, NULL);
    waiting_end(&w, &other, 7, 1, NULL);
    CHECK_EQ(w.count, 1);
    waiting_end(&w, &block, 0, 8, NULL);
    CHECK_EQ(w.count, 0);
    CHECK_EQ(w.vcpus[0].blocked, 0);
    CHECK_EQ(w.vcpus[0].faults, 1);
    CHECK(about(w.vcpus[0].blocked_ns, 10000));
    CHECK(about(w.all_blocked_ns, 10000));
    CHECK_EQ(w.latency.count, 1);
    CHECK(about(w.latency.sum_ns, 10000));
    CHECK_EQ(w.other_faults, 0);
    waiting_close(&w);
}

/* The guest as a whole stands still only while every vCPU waits. */
static void test_overlap(void)
{
    open_waiting(3);
    waiting_begin(&w, 1000, &block, 0);
    pass(100000);
    waiting_begin(&w, 1001, &block, 1);
    pass(20000);
    CHECK_EQ(w.vcpus_blocked, 2);
    waiting_begin(&w, 1002, &block, 2);
    pass(5000);
    waiting_end(&w, &block, 1, 1, NULL);
    CHECK(about(w.all_blocked_ns, 5000));
    pass(40000);
    waiting_end(&w, &block, 0, 3, NULL);
    CHECK(about(w.all_blocked_ns, 5000));
    CHECK(about(w.vcpus[0].blocked_ns, 165000));
    CHECK(about(w.vcpus[1].blocked_ns, 25000));
    CHECK(about(w.vcpus[2].blocked_ns, 45000));
    CHECK_EQ(w.vcpus_blocked, 0);
    /* And again: times add up. */
    for (uint32_t i = 0; i < 3; i++) {
        waiting_begin(&w, 1000 + i, &block, 9);
    }
    pass(3000);
    waiting_end(&w, &block, 9, 1, NULL);
    CHECK(about(w.all_blocked_ns, 8000));
    CHECK(about(w.vcpus[2].blocked_ns, 48000));
    CHECK_EQ(w.vcpus[2].faults, 2);
    CHECK_EQ(w.latency.count, 6);
    waiting_close(&w);
}

static void test_other_threads(void)
{
    open_waiting(1);
    waiting_begin(&w, 5, &block, 0);
    waiting_begin(&w, 6, &block, 0);
    pass(10000);
    waiting_end(&w, &block, 0, 1, NULL);
    CHECK_EQ(w.other_faults, 2);
    CHECK(about(w.other_ns, 20000));
    CHECK_EQ(w.all_blocked_ns, 0);
    CHECK_EQ(w.vcpus[0].faults, 0);
    waiting_close(&w);
}

static void test_no_vcpus(void)
{
    open_waiting(0);
    waiting_begin(&w, 1000, &block, 0);
    pass(10000);
    waiting_end(&w, &block, 0, 1, NULL);
    CHECK_EQ(w.all_blocked_ns, 0);
    CHECK_EQ(w.other_faults, 1);
    waiting_close(&w);
}

/* A signal or an early wake repeats the event; the wait began long ago. */
static void test_repeated_event(void)
{
    open_waiting(1);
    waiting_begin(&w, 1000, &block, 3);
    pass(10000);
    waiting_begin(&w, 1000, &block, 3);
    CHECK_EQ(w.count, 1);
    waiting_end(&w, &block, 3, 1, NULL);
    CHECK_EQ(w.vcpus[0].faults, 1);
    CHECK(about(w.vcpus[0].blocked_ns, 10000));
    waiting_close(&w);
}

/*
 * A page wakes its thread before waiting_end() is called for it, and the
 * thread may be in its next fault by then: that is a new wait.
 */
static void test_next_fault_before_the_end_of_the_last(void)
{
    open_waiting(1);
    waiting_begin(&w, 1000, &block, 3);
    pass(10000);
    waiting_begin(&w, 1000, &block, 4);
    waiting_end(&w, &block, 3, 1, NULL);
    CHECK_EQ(w.count, 1);
    CHECK_EQ(w.vcpus[0].blocked, 1);
    CHECK_EQ(w.vcpus[0].faults, 1);
    pass(30000);
    waiting_end(&w, &block, 4, 1, NULL);
    CHECK_EQ(w.vcpus[0].faults, 2);
    CHECK_EQ(w.vcpus_blocked, 0);
    CHECK(about(w.vcpus[0].blocked_ns, 40000));
    CHECK(about(w.all_blocked_ns, 40000));
    CHECK_EQ(w.latency.count, 2);
    waiting_close(&w);
}

static void test_bounds(void)
{
    open_waiting(VCPUS_MAX + 1);
    CHECK_EQ(w.vcpu_count, VCPUS_MAX);
    for (uint32_t i = 0; i < WAITERS_MAX + 10; i++) {
        waiting_begin(&w, 1000 + i, &block, i);
    }
    CHECK_EQ(w.count, WAITERS_MAX);
    waiting_end(&w, &block, 0, WAITERS_MAX + 10, NULL);
    CHECK_EQ(w.count, 0);
    CHECK_EQ(w.vcpus_blocked, 0);
    CHECK_EQ(w.other_faults, WAITERS_MAX - VCPUS_MAX);
    waiting_close(&w);
}

static struct result begin_and_end(void *arg)
{
    uint32_t thread = *(uint32_t *)arg;

    for (uint64_t page = 0; page < 2000; page++) {
        waiting_begin(&w, thread, &block, page);
        waiting_end(&w, &block, page, 1, NULL);
    }
    return result_ok();
}

static void test_several_threads(void)
{
    struct job jobs[3];
    uint32_t ids[3] = { 1000, 1001, 1 };

    open_waiting(2);
    for (size_t i = 0; i < 3; i++) {
        job_start(&jobs[i], begin_and_end, &ids[i]);
    }
    for (size_t i = 0; i < 3; i++) {
        job_wait(&jobs[i]);
    }
    CHECK_EQ(w.count, 0);
    CHECK_EQ(w.vcpus_blocked, 0);
    CHECK_EQ(w.latency.count, 6000);
    CHECK_EQ(w.vcpus[0].faults + w.vcpus[1].faults + w.other_faults, 6000);
    waiting_close(&w);
}

int main(void)
{
    RUN(test_one_vcpu);
    RUN(test_overlap);
    RUN(test_other_threads);
    RUN(test_no_vcpus);
    RUN(test_repeated_event);
    RUN(test_next_fault_before_the_end_of_the_last);
    RUN(test_bounds);
    RUN(test_several_threads);
    return check_status();
}
