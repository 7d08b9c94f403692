/*
 * What the guest does with its memory, one worker per vCPU.
 *
 * The area is cut into one slice of pages per worker. Each page holds words
 * that follow from the seed, the page's number and its generation; a table of
 * generations, in the guest's RAM as well, says which generation a page must
 * have. A worker picks a page, times the first access, compares all of its
 * words, and writes the page's next generation. So a page that was lost, mixed
 * up, torn or brought back from an older copy is found at its next turn, and
 * so is a stale page of the table.
 *
 * The same source is compiled for the bare guest under KVM and as plain
 * threads of the microvm program. The second kind can't be stopped at any
 * instruction, so workload_step() is made of two halves: it first touches all
 * the memory it will need (`touching` is set: it may be left by a jump and
 * called again later) and then does the work, which waits for nothing. All of
 * a worker's state outside of the guest's RAM is in struct workload.
 */
#ifndef GUEST_WORKLOAD_H
#define GUEST_WORKLOAD_H

#include "settings.h"

#include <stdbool.h>

/* What the worker needs from the place it runs in. */
struct platform {
    void (*print)(const char *bytes, size_t length);
    /* True once, on the first call after the guest came to another VMM. */
    bool (*moved)(void);
};

/* Where things are; the same for all workers. Offsets are into RAM. */
struct layout {
    uint64_t table_offset;
    uint64_t area_offset;
    uint64_t area_pages;
};

struct workload {
    const struct platform *platform;
    uint8_t *ram;
    volatile uint8_t stop; /* somebody wants the step to end early */
    volatile uint8_t touching;

    uint32_t index;
    struct settings settings;
    struct layout layout;
    uint64_t first; /* page of the slice */
    uint64_t pages;

    uint64_t fill_next;  /* of the slice: next page to fill */
    uint64_t random;     /* state of the generator */
    uint64_t sweep_next; /* of the slice: next page in order */
    uint64_t steps;
    uint64_t pace_tsc; /* pages written since then: pace_pages */
    uint64_t pace_pages;
    uint64_t alive_tsc; /* worker 0: when the next line is due */
    uint64_t moved_tsc; /* worker 0: when to ask moved() again */
};

/* False if `ram_size` bytes are too few for a page per worker. */
bool layout_make(struct layout *l, const struct settings *s, uint64_t ram_size);

/* Write the report's header; before any worker starts. */
void layout_report(const struct layout *l, const struct settings *s,
                   uint8_t *ram);

void workload_init(struct workload *w, const struct platform *platform,
                   uint8_t *ram, uint32_t index, const struct settings *s,
                   const struct layout *l);

/*
 * One page filled, or one page accessed. Returns for how many microseconds
 * there is nothing to do; 0 most of the time.
 */
uint32_t workload_step(struct workload *w);

#endif
