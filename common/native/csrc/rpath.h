/*
 * The return path: what the destination tells the source.
 *
 * A message is be16 type, be16 length, then that many bytes. The source's
 * reader answers page requests itself, takes the answers to the pump's marks,
 * and hands every other message to its caller. The destination's writer
 * serialises its threads: requests come from the fault loop, answers to marks
 * from the load loop, everything else from Python.
 */
#ifndef POSTCOPY_RPATH_H
#define POSTCOPY_RPATH_H

#include "source.h"

#define RP_PONG 2
#define RP_REQ_PAGES_ID 3
#define RP_REQ_PAGES 4
#define RP_PAYLOAD_MAX 512 /* QEMU's source refuses longer ones */

struct rp_message {
    uint16_t type;
    uint16_t length;
    uint8_t payload[RP_PAYLOAD_MAX];
};

/*
 * Read the main channel until a message comes that is not a page request.
 * RESULT_CLOSED with what "preempt channel" when the peer closed that one
 * although pages may still be owed.
 */
struct result rpath_run(struct source *s, struct rp_message *message);

/*
 * The destination's end. The mutex protects `channel` and `last`; it is taken
 * before the channel's lock.
 */
struct rpath {
    pthread_mutex_t mutex;
    struct channel *channel; /* NULL while there is no connection */
    const struct ram_block *last;
    uint64_t requests; /* atomic: sent in all */
};

void rpath_open(struct rpath *rp);
void rpath_close(struct rpath *rp);
/* A new epoch, or NULL: the connection is gone and nothing uses it now. */
void rpath_connect(struct rpath *rp, struct channel *channel);
/*
 * Ask for one host page of the source's, `length` bytes; the block is named
 * when it changed. Without a connection nothing is sent: what was requested is
 * asked for again when there is one.
 */
struct result rpath_request(struct rpath *rp, const struct ram_block *block,
                            uint64_t offset, uint64_t length);
/* Answer a PING. Without a connection nothing is sent. */
struct result rpath_pong(struct rpath *rp, uint32_t value);

#endif
