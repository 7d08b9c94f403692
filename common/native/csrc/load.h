/*
 * The destination's page loops: RAM records in, placed pages out.
 *
 * One loader per channel, run by one thread. On the main channel load_main()
 * takes whole RAM sections and discards, and returns in front of everything
 * else, which is Python's to read. On the preempt channel, which has no
 * sections, load_preempt() takes records until the channel ends.
 */
#ifndef POSTCOPY_LOAD_H
#define POSTCOPY_LOAD_H

#include "channel.h"
#include "place.h"
#include "wire.h"

/* Contiguous pages that are placed in one step. */
#define RUN_PAGES 256

struct run {
    struct ram_block *block;
    uint64_t page;
    uint32_t count;
    struct iovec iov[RUN_PAGES];
};

/* A huge page whose target pages arrive one after the other. */
struct assembly {
    struct ram_block *block; /* NULL: none is under way */
    uint64_t host;
    uint64_t count; /* target pages so far */
    bool dropped;   /* it was here before */
    bool data;      /* not only zero pages so far */
    uint8_t *at;
};

struct loader {
    struct destination *d;
    struct channel *channel;
    bool preempt;
    uint32_t section_id;    /* of "ram", from its START; main channel only */
    uint32_t advised;       /* discards are legal now */
    uint32_t discards;      /* commands seen */
    uint32_t begun;         /* the RAM section's first PART was */
    uint32_t ended;         /* the RAM section's END was read */
    uint8_t next;           /* the byte that load_main() stopped before */
    struct ram_block *last; /* CONTINUE state */
    struct run run;
    struct assembly assembly;
    uint8_t *scratch; /* one largest host page */
    size_t scratch_length;
};

struct result loader_open(struct loader *l, struct destination *d,
                          struct channel *channel, bool preempt);
/* Before a new loader takes over, and before the RAM is closed. */
void loader_close(struct loader *l);

/* RESULT_OK: `next` is the first byte of something that is not RAM. */
struct result load_main(struct loader *l);
/* RESULT_OK: the source said that no more urgent pages will come. */
struct result load_preempt(struct loader *l);

/* The records of one section's body, up to and with EOS. */
struct result load_records(struct loader *l);

#endif
