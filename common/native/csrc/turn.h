/*
 * Which thread gets the processor when several want it.
 *
 * A vCPU that waits for a page waits for four threads to wake up in turn, and
 * the threads of the background stream are always ready to run. The scheduler
 * lets a woken thread in at once if its time slice ends before that of the one
 * that runs, so threads in the way of a fault ask for short slices, and threads
 * that carry the bulk never push others aside (SCHED_BATCH). Neither needs a
 * right, and neither changes how much time a thread gets in the long run.
 * Source: sched_setattr(2); a slice of one's own exists since Linux 6.12.
 *
 * A loop takes its turn when it begins and gives it back when it ends: its
 * thread is used for other work afterwards.
 */
#ifndef POSTCOPY_TURN_H
#define POSTCOPY_TURN_H

enum turn { TURN_USUAL, TURN_URGENT, TURN_BULK };

/* For the calling thread. Without help from the kernel nothing changes. */
void turn_take(enum turn turn);

#endif
