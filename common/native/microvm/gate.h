/*
 * The gate between the guest's threads and the one that controls them.
 *
 * While the gate is open the threads run guest code; closing it gets all of
 * them out, wherever they are, and only then returns. A thread is made to
 * leave by a signal whose handler sets the byte `kick`: KVM looks at that byte
 * when it enters the guest, and the signal ends a wait for a missing page. So
 * there is no moment at which a kick could be lost.
 *
 * A thread that runs guest code itself would go back to the same page after
 * the signal. It names a place to jump to and a byte that says when it may be
 * torn away.
 */
#ifndef MICROVM_GATE_H
#define MICROVM_GATE_H

#include "fail.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <sys/types.h>

#define GATE_THREADS_MAX 8u

struct gate_thread {
    struct gate *gate;
    void (*run)(struct gate_thread *);
    volatile uint8_t *kick;       /* set by the handler */
    volatile uint8_t *may_escape; /* NULL: never */
    sigjmp_buf escape;
    pthread_t thread;
    pid_t id;
};

struct gate {
    pthread_mutex_t lock; /* protects what follows */
    pthread_cond_t changed;
    bool open;
    bool ended;
    unsigned inside; /* threads between gate_enter and gate_leave */
    struct gate_thread *threads[GATE_THREADS_MAX];
    unsigned count;
    struct fail reason; /* why it ended */
    int event;          /* eventfd, readable once the guest has ended */
};

bool gate_create(struct gate *gate, struct fail *why);

/*
 * Start a thread that calls `thread->run`; returns when its id is known. At
 * most GATE_THREADS_MAX of them, and all before the gate opens.
 */
bool gate_start(struct gate *gate, struct gate_thread *thread,
                struct fail *why);

/* For the controlling thread. An ended guest stays closed. */
void gate_open(struct gate *gate);

/*
 * False, and the gate is open as before, if a thread can't be got out: KVM may
 * wait for a missing page on its own behalf, for instance for a page table of
 * the guest, and only a signal that kills ends that.
 */
bool gate_close(struct gate *gate, struct fail *why);

/* For the guest's threads. */
void gate_enter(struct gate_thread *thread);
void gate_leave(struct gate_thread *thread);
void gate_nap(struct gate_thread *thread, uint32_t microseconds);
void gate_end(struct gate_thread *thread, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
