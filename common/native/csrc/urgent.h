/*
 * Pages that a guest waits for, on the preempt channel, or on main without one.
 */
#ifndef POSTCOPY_URGENT_H
#define POSTCOPY_URGENT_H

#include "source.h"

/*
 * Send the host page at `offset` as urgent, unless it was sent already. For
 * the request server; the request was read at `asked_ns`.
 */
struct result urgent_serve(struct source *s, struct ram_block *block,
                           uint64_t offset, uint64_t asked_ns);

/*
 * For the pump: go on behind what was asked for. False if nobody has asked
 * since the last time.
 */
bool urgent_take_hint(struct source *s);

#endif
