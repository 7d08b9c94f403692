#include "limit_guest.h"
#include "account.h"
#include "boot.h"
#include "memory.h"
#include "placing.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

/* Seconds in which the guest must have begun, and filled its area. */
#define BEGIN_PATIENCE 20
#define FILL_PATIENCE 300

static bool boot(struct limit_guest *g, const struct limit_guest_options *o,
                 struct fail *why)
{
    char line[COMMAND_LINE_MAX];
    int length =
        snprintf(line, sizeof(line), "%s vcpus=%u tsc-khz=%llu", o->append,
                 o->vcpus, (unsigned long long)vm_tsc_khz(&g->vm));

    if (length < 0 || (size_t)length >= sizeof(line))
        return fail(why, "--append is too long");
    return boot_kernel(&g->vm, &g->ram, o->kernel, line, why);
}

bool limit_guest_boot(struct limit_guest *g,
                      const struct limit_guest_options *o, struct fail *why)
{
    if (!serial_open(&g->serial, o->serial, why) ||
        !ram_create(&g->ram, o->memory, o->page_size, true, why))
        return false;
    if (g->ram.userfaultfd < 0)
        return fail(why, "%s", g->ram.no_userfaultfd.text);
    return place_negotiate(g->ram.userfaultfd, why) &&
           vm_create(&g->vm, &g->ram, o->vcpus, &g->serial, why) &&
           boot(g, o, why);
}

const struct report *limit_guest_report(const struct limit_guest *g)
{
    return (const struct report *)(g->ram.base + REPORT_ADDRESS);
}

/* Filling */

static bool has_begun(const struct report *r)
{
    return __atomic_load_n(&r->header.magic, __ATOMIC_ACQUIRE) == REPORT_MAGIC;
}

static bool is_filled(const struct report *r)
{
    return __atomic_load_n(&r->header.filled, __ATOMIC_ACQUIRE) != 0;
}

/* The guest has no way to call: its memory is looked at. */
static bool wait_until(struct limit_guest *g,
                       bool (*is_so)(const struct report *), unsigned seconds,
                       const char *what, struct fail *why)
{
    double end = clock_seconds() + seconds;

    while (!is_so(limit_guest_report(g))) {
        if (g->vm.engine.gate.ended)
            return fail(why, "%s", g->vm.engine.gate.reason.text);
        if (clock_seconds() > end)
            return fail(why, "the guest has not %s after %u seconds", what,
                        seconds);
        nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
    }
    return true;
}

/* The guest writes these; they must lie in its RAM all the same. */
static bool find_area(struct limit_guest *g, struct fail *why)
{
    struct report_header h = limit_guest_report(g)->header;
    uint64_t page = g->ram.page_size;

    if (h.area_offset > g->ram.length ||
        h.area_pages > (g->ram.length - h.area_offset) / GUEST_PAGE)
        return fail(why, "the guest's area is not in its RAM");
    g->area_start = (h.area_offset + page - 1) / page * page;
    g->area_end = (h.area_offset + h.area_pages * GUEST_PAGE) / page * page;
    if (g->area_start >= g->area_end)
        return fail(why, "the guest's area has no whole page");
    return true;
}

bool limit_guest_fill(struct limit_guest *g, struct fail *why)
{
    gate_open(&g->vm.engine.gate);
    return wait_until(g, has_begun, BEGIN_PATIENCE, "begun", why) &&
           wait_until(g, is_filled, FILL_PATIENCE, "filled its area", why) &&
           gate_close(&g->vm.engine.gate, why) && find_area(g, why);
}

/* Emptying */

bool limit_guest_copy(const struct limit_guest *g, int file, struct fail *why)
{
    uint8_t *copy = memory_map(file, g->ram.length, why);

    if (!copy)
        return false;
    memcpy(copy + g->area_start, g->ram.base + g->area_start,
           g->area_end - g->area_start);
    munmap(copy, g->ram.length);
    return true;
}

bool limit_guest_empty(const struct limit_guest *g, struct fail *why)
{
    uint64_t length = g->area_end - g->area_start;

    if (fallocate(g->ram.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)g->area_start, (off_t)length) < 0)
        return fail(why, "cannot empty the area: %s", strerror(errno));
    return place_watch(g->ram.userfaultfd, g->ram.base + g->area_start, length,
                       why);
}

/* Going on */

static bool all_have_moved(const struct limit_guest *g,
                           const uint64_t counters[REPORT_VCPUS])
{
    const struct report_vcpu *v = limit_guest_report(g)->vcpus;

    for (unsigned i = 0; i < g->vm.engine.vcpus; i++) {
        if (__atomic_load_n(&v[i].counters.counter, __ATOMIC_ACQUIRE) ==
            counters[i])
            return false;
    }
    return true;
}

bool limit_guest_continue(struct limit_guest *g, struct fail *why)
{
    double end = clock_seconds() + BEGIN_PATIENCE;
    uint64_t counters[REPORT_VCPUS];

    for (unsigned i = 0; i < REPORT_VCPUS; i++)
        counters[i] = limit_guest_report(g)->vcpus[i].counters.counter;
    gate_open(&g->vm.engine.gate);
    while (!all_have_moved(g, counters)) {
        if (g->vm.engine.gate.ended)
            return fail(why, "%s", g->vm.engine.gate.reason.text);
        if (clock_seconds() > end)
            return fail(why, "a vCPU has not gone on after %u seconds",
                        BEGIN_PATIENCE);
        nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
    }
    return true;
}

double limit_guest_vcpu_seconds(const struct limit_guest *g)
{
    double sum = 0;

    for (unsigned i = 0; i < g->vm.engine.vcpus; i++)
        sum += cpu_of_thread(g->vm.vcpus[i].thread.thread);
    return sum;
}
