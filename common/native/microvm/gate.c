#include "gate.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define KICK SIGUSR1

/* Less than a daemon waits for the answer. */
#define CLOSE_PATIENCE_S 5

static __thread struct gate_thread *self;

static void on_kick(int number)
{
    struct gate_thread *thread = self;

    (void)number;
    if (!thread)
        return;
    *thread->kick = 1;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (thread->may_escape && *thread->may_escape)
        siglongjmp(thread->escape, 1);
}

bool gate_create(struct gate *gate, struct fail *why)
{
    struct sigaction action = { .sa_handler = on_kick };
    pthread_condattr_t clock;

    *gate = (struct gate){ 0 };
    gate->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (gate->event < 0 || sigaction(KICK, &action, NULL) < 0)
        return fail(why, "cannot set up the threads: %s", strerror(errno));
    pthread_mutex_init(&gate->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&gate->changed, &clock);
    pthread_condattr_destroy(&clock);
    return true;
}

static void *thread_main(void *argument)
{
    struct gate_thread *thread = argument;
    struct gate *gate = thread->gate;

    self = thread;
    pthread_mutex_lock(&gate->lock);
    thread->id = (pid_t)syscall(SYS_gettid);
    gate->threads[gate->count++] = thread;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
    thread->run(thread);
    return NULL;
}

bool gate_start(struct gate *gate, struct gate_thread *thread, struct fail *why)
{
    int error;

    thread->gate = gate;
    thread->id = 0;
    error = pthread_create(&thread->thread, NULL, thread_main, thread);
    if (error)
        return fail(why, "cannot start a thread: %s", strerror(error));
    pthread_mutex_lock(&gate->lock);
    while (thread->id == 0)
        pthread_cond_wait(&gate->changed, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
    return true;
}

void gate_open(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    gate->open = !gate->ended;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

static struct timespec from_now(uint64_t microseconds)
{
    struct timespec at;
    uint64_t nanoseconds;

    clock_gettime(CLOCK_MONOTONIC, &at);
    nanoseconds = (uint64_t)at.tv_nsec + microseconds * 1000;
    at.tv_sec += (time_t)(nanoseconds / 1000000000);
    at.tv_nsec = (long)(nanoseconds % 1000000000);
    return at;
}

static void shut_locked(struct gate *gate)
{
    gate->open = false;
    for (unsigned i = 0; i < gate->count; i++)
        pthread_kill(gate->threads[i]->thread, KICK);
    pthread_cond_broadcast(&gate->changed);
}

/* False if the time is over before all threads have left. */
static bool wait_until_left_locked(struct gate *gate)
{
    struct timespec until = from_now((uint64_t)CLOSE_PATIENCE_S * 1000000);

    while (gate->inside > 0) {
        if (pthread_cond_timedwait(&gate->changed, &gate->lock, &until) != 0)
            return gate->inside == 0;
    }
    return true;
}

bool gate_close(struct gate *gate, struct fail *why)
{
    bool was_open, closed;

    pthread_mutex_lock(&gate->lock);
    was_open = gate->open;
    shut_locked(gate);
    closed = wait_until_left_locked(gate);
    if (!closed) {
        gate->open = was_open && !gate->ended;
        pthread_cond_broadcast(&gate->changed);
    }
    pthread_mutex_unlock(&gate->lock);
    return closed || fail(why, "a vCPU waits in the kernel for a page and "
                               "cannot be stopped before it comes");
}

void gate_enter(struct gate_thread *thread)
{
    struct gate *gate = thread->gate;

    pthread_mutex_lock(&gate->lock);
    while (!gate->open)
        pthread_cond_wait(&gate->changed, &gate->lock);
    /* Under the lock: the kick of the next closing comes after this. */
    *thread->kick = 0;
    gate->inside++;
    pthread_mutex_unlock(&gate->lock);
}

void gate_leave(struct gate_thread *thread)
{
    struct gate *gate = thread->gate;

    pthread_mutex_lock(&gate->lock);
    gate->inside--;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

void gate_nap(struct gate_thread *thread, uint32_t microseconds)
{
    struct timespec until = from_now(microseconds);
    struct gate *gate = thread->gate;

    pthread_mutex_lock(&gate->lock);
    while (gate->open &&
           pthread_cond_timedwait(&gate->changed, &gate->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&gate->lock);
}

void gate_end(struct gate_thread *thread, const char *format, ...)
{
    struct gate *gate = thread->gate;
    va_list arguments;

    pthread_mutex_lock(&gate->lock);
    if (!gate->ended) {
        gate->ended = true;
        va_start(arguments, format);
        vsnprintf(gate->reason.text, sizeof(gate->reason.text), format,
                  arguments);
        va_end(arguments);
        shut_locked(gate);
        eventfd_write(gate->event, 1);
    }
    pthread_mutex_unlock(&gate->lock);
}
