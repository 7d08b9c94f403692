/*
 * What the test guest tells about itself, at a fixed guest physical address.
 *
 * Anybody who can read the guest's memory can read it: another mapping of the
 * memfd, QEMU's `pmemsave`, a debugger. All integers are little-endian. Each
 * vCPU writes only its own part, vCPU 0 the header too; nobody takes a lock,
 * so numbers read from a running guest may belong to neighbouring moments.
 *
 *     0x200000  header                       one page
 *     0x201000  vCPU 0: counters             one page
 *     0x202000          histogram            one page
 *     0x203000          slow accesses        one page
 *     0x204000  vCPU 1: ...                  and so on, 8 of them
 *
 * tests/support/report.py reads the same layout; change both together.
 */
#ifndef GUEST_REPORT_H
#define GUEST_REPORT_H

#include <stddef.h>
#include <stdint.h>

#define REPORT_ADDRESS 0x200000u
#define REPORT_MAGIC 0x79706f6374736f70u /* "postcopy" */
#define REPORT_VERSION 1u
#define REPORT_VCPUS 8u

#define GUEST_PAGE 4096u

/*
 * Bucket of a duration in TSC ticks: its highest bit and the three below, so
 * that a bucket is at most 1/8 wide: 8 * log2 + the three bits. Durations
 * below 8 ticks have their own number.
 */
#define REPORT_BUCKETS 512u

#define REPORT_SLOW 128u

enum report_state {
    REPORT_ABSENT = 0,
    REPORT_FILLING = 1,
    REPORT_RUNNING = 2,
};

enum report_mode {
    REPORT_WRITING = 0,
    REPORT_READING = 1,
    REPORT_IDLE = 2,
};

struct report_header {
    uint64_t magic;
    uint32_t version;
    uint32_t vcpus;
    uint64_t tsc_khz;
    uint64_t area_offset; /* of the area in RAM, bytes */
    uint64_t area_pages;
    uint64_t table_offset; /* of the table of generations in RAM, bytes */
    uint64_t seed;
    uint64_t write_rate; /* bytes per second, all vCPUs; 0: unlimited */
    uint32_t mode;
    uint32_t filled; /* 1 as soon as every vCPU has filled its slice */
    uint8_t reserved[GUEST_PAGE - 72];
};

struct report_wrong {
    uint64_t page;
    uint64_t word;
    uint64_t expected;
    uint64_t got;
    uint32_t generation; /* the one the table says */
    uint32_t reserved;
};

struct report_counters {
    uint32_t state;
    uint32_t reserved0;
    uint64_t counter;     /* steps done since the start; only ever grows */
    uint64_t checked;     /* pages compared word by word */
    uint64_t wrong;       /* pages that differed */
    uint64_t written;     /* pages written after the fill */
    uint64_t filled;      /* pages filled */
    uint64_t sweeps;      /* times every page of the slice had its turn */
    uint64_t slice_first; /* page */
    uint64_t slice_pages;
    struct report_wrong first_wrong;
    uint64_t slowest_ticks;
    uint64_t slowest_page;
    uint64_t slow_ticks; /* an access at least this long is a slow one */
    uint64_t slow;       /* slow accesses; the last 128 are in the ring */
    uint8_t reserved[GUEST_PAGE - 144];
};

struct report_slow {
    uint64_t tsc; /* when it ended */
    uint64_t ticks;
    uint64_t page;
    uint64_t counter;
};

struct report_vcpu {
    struct report_counters counters;
    uint64_t histogram[REPORT_BUCKETS];
    struct report_slow slow[REPORT_SLOW];
};

struct report {
    struct report_header header;
    struct report_vcpu vcpus[REPORT_VCPUS];
};

_Static_assert(sizeof(struct report_header) == GUEST_PAGE, "header");
_Static_assert(offsetof(struct report_header, filled) == 68, "header");
_Static_assert(sizeof(struct report_counters) == GUEST_PAGE, "counters");
_Static_assert(offsetof(struct report_counters, first_wrong) == 72, "counters");
_Static_assert(offsetof(struct report_counters, slow) == 136, "counters");
_Static_assert(sizeof(struct report_vcpu) == 3 * GUEST_PAGE, "vcpu");
_Static_assert(sizeof(struct report) == 25 * GUEST_PAGE, "report");

#endif
