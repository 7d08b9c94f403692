#include "account.h"

#include <time.h>

static double read_clock(clockid_t clock)
{
    struct timespec t;

    if (clock_gettime(clock, &t) < 0)
        return 0;
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

double clock_seconds(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

double cpu_of_this_thread(void)
{
    return read_clock(CLOCK_THREAD_CPUTIME_ID);
}

double cpu_of_this_process(void)
{
    return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

double cpu_of_thread(pthread_t thread)
{
    clockid_t clock;

    return pthread_getcpuclockid(thread, &clock) == 0 ? read_clock(clock) : 0;
}

double cpu_of_process(pid_t pid)
{
    clockid_t clock;

    return clock_getcpuclockid(pid, &clock) == 0 ? read_clock(clock) : 0;
}
