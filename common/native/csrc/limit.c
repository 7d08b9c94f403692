#include "limit.h"

#include <time.h>

#define NS_PER_S UINT64_C(1000000000)
/* A limited channel may burst what it is allowed in this time. */
#define BURST_NS (NS_PER_S / 200)

uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

void limit_set(struct limit *l, uint64_t rate)
{
    __atomic_store_n(&l->rate, rate, __ATOMIC_RELAXED);
}

/* a * b / NS_PER_S without overflow, for any rate a and any time b. */
static int64_t scale(uint64_t rate, uint64_t ns)
{
    unsigned __int128 bytes = (unsigned __int128)rate * ns / NS_PER_S;

    return bytes > INT64_MAX / 2 ? INT64_MAX / 2 : (int64_t)bytes;
}

static void refill(struct limit *l, uint64_t rate)
{
    uint64_t now = clock_ns();
    uint64_t passed = l->last_ns ? now - l->last_ns : BURST_NS;
    int64_t most = scale(rate, BURST_NS);
    int64_t gain = scale(rate, passed < NS_PER_S ? passed : NS_PER_S);

    if (l->last_ns && gain == 0) {
        return; /* less than a byte came free: let the time add up */
    }
    l->last_ns = now;
    l->credit = l->credit > most - gain ? most : l->credit + gain;
}

void limit_take(struct limit *l, uint64_t bytes)
{
    uint64_t rate = __atomic_load_n(&l->rate, __ATOMIC_RELAXED);

    if (rate == 0) {
        l->credit = 0;
        l->last_ns = 0;
        return;
    }
    refill(l, rate);
    l->credit -= (int64_t)bytes;
}

uint64_t limit_wait_ns(struct limit *l)
{
    uint64_t rate = __atomic_load_n(&l->rate, __ATOMIC_RELAXED);
    unsigned __int128 ns;

    if (rate == 0) {
        return 0;
    }
    refill(l, rate);
    if (l->credit >= 0) {
        return 0;
    }
    ns = (unsigned __int128)(uint64_t)-l->credit * NS_PER_S / rate;
    return ns > LIMIT_NAP_NS ? LIMIT_NAP_NS : (uint64_t)ns + 1;
}
