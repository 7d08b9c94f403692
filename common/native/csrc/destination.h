/*
 * The destination's RAM: what it is made of, and the borders between its
 * phases.
 *
 * Three ways to place a page, chosen once:
 *
 *   PLACE_FILE      nobody runs on the RAM: write to its file.
 *   PLACE_CONTINUE  the guest's mapping is registered for missing and minor
 *                   faults: write to the file, set the received bit, then map
 *                   the page into the guest (UFFDIO_CONTINUE). In this order:
 *                   the guest can have written only to pages whose bit is set,
 *                   so whoever comes after a crash knows what it may overwrite.
 *   PLACE_COPY      kernels without minor faults: UFFDIO_COPY, then the bit.
 *
 * With PLACE_CONTINUE a stale page is simply never mapped. The other two have
 * to punch it out when it is discarded: one would find it in the guest, the
 * other keeps the file.
 *
 * A page of zeroes stays a hole in the file until somebody touches it.
 *
 * Before destination_listen() pages are stored as they come and a later copy
 * overwrites an earlier one. After it each is placed once; see place.h.
 */
#ifndef POSTCOPY_DESTINATION_H
#define POSTCOPY_DESTINATION_H

#include "ram.h"
#include "rpath.h"
#include "wait.h"

enum place_way { PLACE_FILE, PLACE_CONTINUE, PLACE_COPY };

struct destination_stats {
    uint64_t precopy_pages; /* target pages that arrived, as the next */
    uint64_t postcopy_pages;
    uint64_t preempt_pages;   /* of these, on the preempt channel */
    uint64_t zero_pages;      /* of all, as zero pages */
    uint64_t duplicate_pages; /* arrived although they were here */
    uint64_t faults;          /* events read */
    uint64_t faults_here;     /* of these, on pages that were here */
    uint64_t faults_known;    /* of these, on pages already asked for */
};

struct destination {
    struct ram *ram;
    int32_t way;        /* enum place_way */
    int uffd;           /* negotiated; unused for PLACE_FILE */
    uint32_t listening; /* atomic: postcopy, the guest may run */
    /*
     * A machine of a kind that is not known may have RAM that is never sent,
     * because nothing is plugged in there. What is neither sent nor discarded
     * is a hole then, and nothing to wait for. Set before listening.
     */
    uint32_t unsent_is_hole;
    uint32_t discards; /* ranges so far */
    uint64_t missing;  /* atomic: host pages that are not here */
    int complete_fd;   /* eventfd, readable when nothing is missing */
    uint8_t *zeroes;   /* one largest host page, never written */
    size_t zeroes_length;
    struct rpath rpath;
    struct waiting waiting;
    struct destination_stats stats;
};

struct result destination_open(struct destination *d, struct ram *ram,
                               int32_t way, int uffd, const uint32_t *vcpus,
                               uint32_t vcpu_count);
void destination_close(struct destination *d);

/* Forget all content: every block reads as zero afterwards. */
struct result destination_empty(struct destination *d);
/*
 * The source will send this range of a block again; bytes, host page aligned
 * and within the block (checked by the caller).
 */
struct result destination_discard(struct destination *d, uint32_t block,
                                  uint64_t start, uint64_t length);
/* Can the guest's RAM be registered? Leaves it as it was. */
struct result destination_probe(struct destination *d);
/* From here on missing pages make the guest wait. */
struct result destination_listen(struct destination *d);
/*
 * The connection is gone, and no load loop runs: what was on its way and has
 * not been placed is missing again. Whoever waits for a page faults once more.
 */
struct result destination_begin_epoch(struct destination *d);
/*
 * Whoever waits for a page faults once more: for faults that were read and not
 * answered.
 */
struct result destination_wake(struct destination *d);
/* All is here: let the kernel handle the guest's faults again. */
struct result destination_finish(struct destination *d);
uint64_t destination_missing(struct destination *d);
/* For who places the last one: makes complete_fd readable. */
void destination_note_complete(struct destination *d);

#endif
