/*
 * The source's data plane: what its loops share.
 *
 * One thread runs pump_precopy() or pump_postcopy() (pump.h), one rpath_run()
 * (rpath.h), which answers page requests itself (urgent.h): an urgent page
 * waits for no other thread to wake up.
 *
 * Exactly once. In postcopy a host page is sent by whoever clears its bit in
 * the block's `owed` bitmap. The pump clears bits before it takes a lock; the
 * request server clears them only while it holds the lock of the channel that
 * will carry the page. So when the pump has found no bit set and then held the
 * urgent channel's lock once, nothing more will be sent, and END may follow.
 *
 * Lock order: there is one lock, a channel's; nobody holds two.
 */
#ifndef POSTCOPY_SOURCE_H
#define POSTCOPY_SOURCE_H

#include "arriving.h"
#include "batch.h"
#include "channel.h"
#include "flow.h"
#include "limit.h"
#include "stats.h"
#include "stored.h"
#include "wire.h"

struct source_stats {
    uint64_t normal_pages;      /* sent with data, precopy and postcopy */
    uint64_t zero_pages;        /* sent as ZERO records */
    uint64_t background_pages;  /* target pages, in postcopy, unasked */
    uint64_t urgent_pages;      /* target pages, in postcopy, requested */
    uint64_t neighbour_pages;   /* of these, sent along with a requested one */
    uint64_t urgent_on_preempt; /* of these, on the preempt channel */
    uint64_t requests;          /* messages that asked for pages */
    uint64_t requests_late;     /* of these, for pages already sent */
    uint64_t background_waits;  /* the pump waited for a channel's lock */
    uint64_t background_pauses; /* it left the processors to faults */
    uint64_t hole_pages;        /* of zero_pages, found without reading them */
    uint64_t left_out_pages;    /* target pages of zeroes, never sent so far */
    uint64_t working_set_pages; /* of background_pages, those sent first */
    uint64_t awaited_pages;     /* host pages asked for that had to come */
    struct histogram queue;     /* request read .. its page's turn to be sent */
    struct histogram send;      /* .. handed to the kernel */
};

#define RECENT_REQUESTS 8

struct asked_page {
    const struct ram_block *block;
    uint64_t host;
};

struct source {
    struct ram *ram;
    struct channel *main;
    struct channel *urgent; /* atomic: preempt, or main without one */
    uint32_t section_id;
    struct limit limit;  /* of background pages */
    struct flow flow;    /* of the same, in postcopy */
    int wake_fd;         /* eventfd: look at limit, flow and yield again */
    uint32_t flow_waits; /* atomic: an answer has to be told to the pump */
    uint32_t yield;      /* atomic: leave the pass as soon as possible */
    uint32_t ended;      /* atomic: EOF was written, closing is no error */
    uint64_t hint;       /* atomic: 1 + where a request was, see urgent.c */
    uint64_t served_ns;  /* atomic: when a request was served last */

    uint32_t cursor_block; /* pump thread only, as the next five */
    uint64_t cursor_page;
    uint64_t begun_ns; /* postcopy, on these channels */
    uint32_t ahead;    /* pages to go on from there before the working set */
    struct batch batch;
    struct extent extent;

    struct batch urgent_batch; /* request server only, as the next four */
    struct ram_block *asked;
    uint64_t read_ns; /* when requests were read last */
    struct asked_page recent[RECENT_REQUESTS];
    uint32_t recent_next;

    uint64_t
        only_asked_ns; /* nothing unasked for so long; fixed once loops run */
    struct stored *stored;     /* NULL: a guest's memory, not stored RAM */
    struct arriving *arriving; /* NULL: all of it is here */
    struct source_stats stats;
};

struct result source_open(struct source *s, struct ram *ram,
                          uint32_t section_id);
void source_close(struct source *s);
/* The RAM is stored; `stored` is the caller's, open until source_close(). */
struct result source_serve(struct source *s, struct stored *stored);
/* The stored RAM is still arriving; likewise. Before any loop runs. */
void source_await(struct source *s, struct arriving *arriving);
/* A new epoch: channels are new, the cursors start over. */
void source_connect(struct source *s, struct channel *main_channel,
                    struct channel *urgent);
/*
 * Urgent pages go on this channel from now on, while loops run: it has turned
 * out that the peer reads from it.
 */
void source_use_preempt(struct source *s, struct channel *preempt);
void source_limit(struct source *s, uint64_t bytes_per_second);
void source_yield(struct source *s, bool yield);

/* How many target pages are dirty. */
uint64_t source_dirty_pages(const struct source *s);

/*
 * The guest has stopped: what is dirty, by whole host pages, becomes owed.
 * If nothing is, the first host page is, since a destination may insist on at
 * least one discard. Returns the number of host pages owed.
 */
uint64_t source_owe_dirty(struct source *s);
/* How many target pages are owed, those that are left out not counted. */
uint64_t source_owed_pages(const struct source *s);
/*
 * After a recovery: what a destination has not received of a block is owed,
 * whatever was owed before. `received` has a bit for each target page, as on
 * the wire; a host page of which only a part is there is owed whole. No loop
 * may run.
 */
void source_owe_missing(struct ram_block *b, const uint8_t *received);
static inline bool source_must_yield(const struct source *s)
{
    return __atomic_load_n(&s->yield, __ATOMIC_SEQ_CST);
}

static inline struct channel *source_urgent(const struct source *s)
{
    return __atomic_load_n(&s->urgent, __ATOMIC_SEQ_CST);
}

/* Whoever clears the bit sends the page: true for one caller. */
bool source_claim(struct ram_block *b, uint64_t host);

/*
 * For every page that is looked at: stored RAM is compared with its checksums
 * first, by host pages.
 */
static inline struct result
source_check(struct source *s, const struct ram_block *b, uint64_t host)
{
    return s->stored ?
               stored_check(s->stored, b, host << b->host_bits, b->page_size) :
               result_ok();
}
/* Is all of this host page here? */
static inline bool source_has(const struct source *s, const struct ram_block *b,
                              uint64_t host)
{
    return !s->arriving || arriving_has(s->arriving, b, host);
}
/* May this host page be left out? `e` as in batch_add_page(). */
bool source_leaves_out(const struct source *s, struct batch *batch,
                       struct extent *e, const struct ram_block *b,
                       uint64_t host);

/* Look at limit, flow and yield again. */
void source_wake(struct source *s);
/* Add pages to a batch of this source; as batch_add_page(). */
struct result source_add_page(struct source *s, struct batch *batch,
                              struct extent *e, const struct ram_block *b,
                              uint64_t page);
struct result source_add_host_page(struct source *s, struct batch *batch,
                                   struct extent *e, const struct ram_block *b,
                                   uint64_t host);
/* They were written. */
void source_count(struct source *s, const struct batch *b);

#endif
