/*
 * When the source's background may send its next part, and how large that is:
 * the rate limit, the window of what is on its way (flow.h), and the requests,
 * which have the link and the processors first.
 *
 * RESULT_STOPPED when the channel was stopped meanwhile. Pump thread only.
 */
#ifndef POSTCOPY_PACE_H
#define POSTCOPY_PACE_H

#include "source.h"

/* The most target pages of one part of precopy. */
uint32_t pace_pages(const struct source *s);
/* Bytes of one part of postcopy: zero pages count for what they are sent as. */
uint64_t pace_bytes(struct source *s);

/* Wait until the limit lets us go on, or somebody changes our orders. */
struct result pace_limit(struct source *s);
/* In postcopy: until limit, window and requests let us go on. */
struct result pace_turn(struct source *s);
/* Until somebody wakes the pump, or for so long; -1: for ever. */
struct result pace_wake(struct source *s, int timeout_ms);
/* As long as nothing is to be sent that nobody has asked for. */
struct result pace_asking(struct source *s);
/* Behind each part: a moment for those who serve faults. */
void pace_leave_processors(struct source *s);

/* For the return path's reader: a PONG that may answer one of our marks. */
bool pace_take_answer_untrusted(struct source *s, uint32_t value);

#endif
