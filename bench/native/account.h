/* Time that passes and time that a processor works. All in seconds. */
#ifndef BENCH_ACCOUNT_H
#define BENCH_ACCOUNT_H

#include <pthread.h>
#include <sys/types.h>

double clock_seconds(void);

/* User and system time so far; a process counts with all of its threads. */
double cpu_of_this_thread(void);
double cpu_of_this_process(void);
/* 0 if there is no such thread or process any more. */
double cpu_of_thread(pthread_t thread);
double cpu_of_process(pid_t pid);

#endif
