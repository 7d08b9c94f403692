/*
 * The built-in guest under KVM, in this process, with nobody attached: booted
 * until its area is full, stopped, its area taken away, and let go on.
 */
#ifndef BENCH_LIMIT_GUEST_H
#define BENCH_LIMIT_GUEST_H

#include "guest/report.h"
#include "vm.h"

struct limit_guest_options {
    const char *kernel;
    const char *append; /* as in guest/settings.h */
    const char *serial;
    uint64_t memory;
    uint64_t page_size;
    unsigned vcpus;
};

/* One process has one of them, until it ends. */
struct limit_guest {
    struct ram ram;
    struct serial serial;
    struct vm vm;
    /* Offsets in RAM, whole pages of `ram`: nothing but the guest's area. */
    uint64_t area_start;
    uint64_t area_end;
};

bool limit_guest_boot(struct limit_guest *g,
                      const struct limit_guest_options *o, struct fail *why);

/* Returns when the area is full and no vCPU runs. */
bool limit_guest_fill(struct limit_guest *g, struct fail *why);

/* Copy the area to the same offsets of `file`. */
bool limit_guest_copy(const struct limit_guest *g, int file, struct fail *why);

/* Take the area's pages away and watch it with the guest's userfaultfd. */
bool limit_guest_empty(const struct limit_guest *g, struct fail *why);

/*
 * Let the vCPUs run, and wait until each of them has counted an access. That
 * one may have begun before the stop, so it tells nothing.
 */
bool limit_guest_continue(struct limit_guest *g, struct fail *why);

/* Where the guest counts its accesses. It runs on while this is read. */
const struct report *limit_guest_report(const struct limit_guest *g);

double limit_guest_vcpu_seconds(const struct limit_guest *g);

#endif
