/*
 * Pages that a guest waits for, on the preempt channel, or on main without one.
 */
#ifndef POSTCOPY_URGENT_H
#define POSTCOPY_URGENT_H

#include "source.h"

/*
 * Send the host page at `offset` as urgent, unless it was sent already; once
 * it is here. For the request server; the request was read at `asked_ns`.
 */
struct result urgent_serve(struct source *s, struct ram_block *block,
                           uint64_t offset, uint64_t asked_ns);

/*
 * For the request server, whenever it waits: pages that were asked for before
 * they had arrived, and are here now. It waits no longer than ARRIVING_LOOK_NS
 * while there are others.
 */
struct result urgent_serve_arrived(struct source *s);
static inline bool urgent_awaits(const struct source *s)
{
    return s->arriving && s->arriving->count;
}

/*
 * For the pump: go on behind what was asked for. False if nobody has asked
 * since the last time.
 */
bool urgent_take_hint(struct source *s);

#endif
