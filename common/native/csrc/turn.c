#include "turn.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SLICE_URGENT_NS UINT64_C(100000)
#define SLACK_BULK_NS 1000UL

/* From the kernel's include/uapi/linux/sched/types.h, first version. */
struct attributes {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime; /* the slice, for ordinary threads; 0: the default */
    uint64_t deadline;
    uint64_t period;
};

/* Whoever runs us as a real-time or an idle thread has said what he wants. */
static bool is_ordinary(const struct attributes *a)
{
    return a->policy == SCHED_OTHER || a->policy == SCHED_BATCH;
}

void turn_take(enum turn turn)
{
    static _Thread_local struct attributes usual; /* size 0: not known yet */
    int before = errno;
    struct attributes wanted;

    if (!usual.size &&
        syscall(SYS_sched_getattr, 0, &usual, sizeof(usual), 0)) {
        usual.size = 0;
    }
    if (usual.size && is_ordinary(&usual)) {
        wanted = usual;
        wanted.size = sizeof(wanted);
        wanted.flags = 0;
        if (turn == TURN_BULK) {
            wanted.policy = SCHED_BATCH;
        }
        if (turn == TURN_URGENT) {
            wanted.runtime = SLICE_URGENT_NS;
        }
        (void)syscall(SYS_sched_setattr, 0, &wanted, 0);
    }
    /* The bulk pauses for less than the usual slack; 0 is the usual one. */
    (void)prctl(PR_SET_TIMERSLACK, turn == TURN_BULK ? SLACK_BULK_NS : 0);
    errno = before;
}
