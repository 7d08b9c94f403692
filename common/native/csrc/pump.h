/*
 * The source's data plane: background pages, urgent pages.
 *
 * One thread runs pump_precopy() or pump_postcopy(), one runs rpath_run()
 * (rpath.h), which answers page requests itself: an urgent page waits for no
 * other thread to wake up.
 *
 * Exactly once. In postcopy a host page is sent by whoever clears its bit in
 * the block's `owed` bitmap. The pump clears bits before it takes a lock; the
 * request server clears them only while it holds the lock of the channel that
 * will carry the page. So when the pump has found no bit set and then held the
 * urgent channel's lock once, nothing more will be sent, and END may follow.
 *
 * Lock order: there is one lock, a channel's; nobody holds two.
 */
#ifndef POSTCOPY_PUMP_H
#define POSTCOPY_PUMP_H

#include "batch.h"
#include "channel.h"
#include "flow.h"
#include "limit.h"
#include "stats.h"
#include "wire.h"

struct source_stats {
    uint64_t normal_pages;      /* sent with data, precopy and postcopy */
    uint64_t zero_pages;        /* sent as ZERO records */
    uint64_t background_pages;  /* target pages, in postcopy, unasked */
    uint64_t urgent_pages;      /* target pages, in postcopy, requested */
    uint64_t urgent_on_preempt; /* of these, on the preempt channel */
    uint64_t requests;          /* messages that asked for pages */
    uint64_t requests_late;     /* of these, for pages already sent */
    uint64_t background_waits;  /* the pump waited for a channel's lock */
    uint64_t hole_pages;        /* of zero_pages, found without reading them */
    struct histogram queue;     /* request read .. its page's turn to be sent */
    struct histogram send;      /* .. handed to the kernel */
};

struct source {
    struct ram *ram;
    struct channel *main;
    struct channel *urgent; /* the preempt channel, or main without one */
    uint32_t section_id;
    struct limit limit; /* of background pages */
    struct flow flow;    /* of the same, in postcopy */
    int wake_fd;         /* eventfd: look at limit, flow and yield again */
    uint32_t flow_waits; /* atomic: an answer has to be told to the pump */
    uint32_t yield;     /* atomic: leave the pass as soon as possible */
    uint32_t ended;     /* atomic: EOF was written, closing is no error */
    uint64_t hint;      /* atomic: 1 + where a request was, see pump.c */

    uint32_t cursor_block; /* pump thread only, as the next three */
    uint64_t cursor_page;
    struct batch batch;
    struct extent extent;

    struct batch urgent_batch; /* request server only, as the next two */
    struct ram_block *asked;
    uint64_t read_ns; /* when requests were read last */

    struct source_stats stats;
};

struct result source_open(struct source *s, struct ram *ram,
                          uint32_t section_id);
void source_close(struct source *s);
/* A new epoch: channels are new, the cursors start over. */
void source_connect(struct source *s, struct channel *main_channel,
                    struct channel *urgent);
void source_limit(struct source *s, uint64_t bytes_per_second);
void source_yield(struct source *s, bool yield);

/*
 * One pass over the dirty bitmaps. RESULT_OK: all that was dirty is written;
 * RESULT_STOPPED with what "yield" when source_yield() cut it short.
 */
struct result pump_precopy(struct source *s);

/* How many target pages are dirty. */
uint64_t source_dirty_pages(const struct source *s);

/*
 * The guest has stopped: what is dirty, by whole host pages, becomes owed.
 * If nothing is, the first host page is, since a destination may insist on at
 * least one discard. Returns the number of host pages owed.
 */
uint64_t source_owe_dirty(struct source *s);
uint64_t source_owed_pages(const struct source *s);
/*
 * Tell the destination to drop what is owed, block by block, in ascending
 * order: RAM_DISCARD commands on the main channel.
 */
struct result pump_discards(struct source *s);

/* Send all that is owed; RESULT_OK when nothing is left and in flight. */
struct result pump_postcopy(struct source *s);

/* For the return path's reader: a PONG that may answer one of our marks. */
bool pump_take_answer_untrusted(struct source *s, uint32_t value);

/*
 * Send the host page at `offset` as urgent, unless it was sent already. For
 * the request server; the request was read at `asked_ns`.
 */
struct result pump_urgent(struct source *s, struct ram_block *block,
                          uint64_t offset, uint64_t asked_ns);

#endif
