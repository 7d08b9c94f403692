#include "turn.h"

#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

static void test_bulk_pushes_nobody_aside(void)
{
    int usual = sched_getscheduler(0);

    turn_take(TURN_BULK);
    CHECK_EQ(sched_getscheduler(0), SCHED_BATCH);
    CHECK_EQ(prctl(PR_GET_TIMERSLACK), 1000);
    turn_take(TURN_USUAL);
    CHECK_EQ(sched_getscheduler(0), usual);
    CHECK(prctl(PR_GET_TIMERSLACK) > 1000);
}

static void test_urgent_stays_ordinary(void)
{
    turn_take(TURN_URGENT);
    CHECK_EQ(sched_getscheduler(0), SCHED_OTHER);
    turn_take(TURN_USUAL);
    CHECK_EQ(sched_getscheduler(0), SCHED_OTHER);
}

static void test_errno_is_kept(void)
{
    errno = EXDEV;
    turn_take(TURN_URGENT);
    turn_take(TURN_USUAL);
    CHECK_EQ(errno, EXDEV);
}

/* Whoever was told to run only when nobody else does goes on so. */
static void *idle_thread(void *arg)
{
    const struct sched_param none = { 0 };
    int *policy = arg;

    if (sched_setscheduler(0, SCHED_IDLE, &none) == 0) {
        turn_take(TURN_URGENT);
        *policy = sched_getscheduler(0);
    }
    return NULL;
}

static void test_other_policies_are_left(void)
{
    pthread_t thread;
    int policy = SCHED_IDLE;

    CHECK_EQ(pthread_create(&thread, NULL, idle_thread, &policy), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(policy, SCHED_IDLE);
}

int main(void)
{
    RUN(test_bulk_pushes_nobody_aside);
    RUN(test_urgent_stays_ordinary);
    RUN(test_errno_is_kept);
    RUN(test_other_policies_are_left);
    return check_status();
}
