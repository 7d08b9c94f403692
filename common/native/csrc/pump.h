/*
 * The source's background: passes over dirty pages, then what is owed.
 */
#ifndef POSTCOPY_PUMP_H
#define POSTCOPY_PUMP_H

#include "source.h"

/*
 * One pass over the dirty bitmaps. RESULT_OK: all that was dirty is written;
 * RESULT_STOPPED with what "yield" when source_yield() cut it short.
 */
struct result pump_precopy(struct source *s);

/*
 * Tell the destination to drop what is owed, block by block, in ascending
 * order: RAM_DISCARD commands on the main channel.
 */
struct result pump_discards(struct source *s);

/* Send all that is owed; RESULT_OK when nothing is left and in flight. */
struct result pump_postcopy(struct source *s);

#endif
