#include "turn.h"

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/resource.h>
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

void turn_take(enum turn turn)
{
    int before = errno;
    struct attributes wanted = {
        .size = sizeof(wanted),
        .policy = turn == TURN_BULK ? SCHED_BATCH : SCHED_OTHER,
        .nice = getpriority(PRIO_PROCESS, 0), /* of this thread, in Linux */
        .runtime = turn == TURN_URGENT ? SLICE_URGENT_NS : 0,
    };

    (void)syscall(SYS_sched_setattr, 0, &wanted, 0);
    /* The bulk pauses for less than the usual slack; 0 is the usual one. */
    (void)prctl(PR_SET_TIMERSLACK, turn == TURN_BULK ? SLACK_BULK_NS : 0);
    errno = before;
}
