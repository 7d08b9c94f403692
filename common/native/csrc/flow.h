/*
 * How much of the background stream may be on its way at once.
 *
 * Buffers between the two ends may be deep and tell nobody: a relay's, a
 * switch's, the receiver's socket. Whatever waits in them is in front of the
 * next page that a vCPU waits for. So the source puts a mark (a PING) behind
 * what it sends, any destination answers it (a PONG) when it has taken all that
 * came before, and no more than a window is sent ahead of the last answer.
 *
 * The window follows the time that an answer takes. `base_ns` is that time
 * without a queue; what is above it is queue, and the window is scaled so that
 * the queue stays at FLOW_QUEUE_NS:
 *
 *     window = window * (base + FLOW_QUEUE) / time of an answer
 *
 * and doubled as long as there is next to none. This is the rule of delay-based
 * congestion control (TCP Vegas, FAST TCP). The time is the shortest of the
 * last few: a thread that was not scheduled for a moment is no queue. Since a
 * queue that never drains would pass for the base, everything sent is now and
 * then left to arrive before a mark goes out alone.
 *
 * One thread sends, one takes the answers.
 */
#ifndef POSTCOPY_FLOW_H
#define POSTCOPY_FLOW_H

#include "error.h"

#include <pthread.h>

/* Time that pages may queue for, in front of an urgent one. */
#define FLOW_QUEUE_NS UINT64_C(500000)
#define FLOW_WINDOW_MIN ((uint64_t)16 << 10)
#define FLOW_WINDOW_FIRST ((uint64_t)64 << 10)
#define FLOW_WINDOW_MAX ((uint64_t)64 << 20)
/* The base is measured again after this time, or this often its own. */
#define FLOW_PROBE_NS UINT64_C(1000000000)
#define FLOW_PROBE_BASES 50
/* It is the shortest of so many measurements: a thread may come late. */
#define FLOW_PROBES 4
#define FLOW_MARKS 64
#define FLOW_RECENT 8

struct flow_mark {
    uint64_t sent;  /* bytes that were sent in front of it */
    uint64_t ahead; /* bytes of these that were on their way with it */
    uint64_t at_ns;
    bool alone; /* nothing else was on its way */
};

struct flow {
    pthread_mutex_t mutex; /* protects all of this */
    uint64_t window;       /* bytes */
    uint64_t least;        /* bytes that the window never goes below */
    uint64_t sent;         /* bytes, in all */
    uint64_t taken;        /* of these, in front of an answered mark */
    uint64_t base_ns;      /* 0: not measured yet */
    uint64_t mib_ns;       /* see flow_link_ns(); 0: not known */
    uint64_t probes_ns[FLOW_PROBES]; /* the last measurements; 0: none */
    uint32_t probes;
    uint64_t probe_at_ns; /* when to measure the base again */
    uint32_t next;        /* number of the next mark */
    uint32_t answered;    /* marks below this one are */
    uint32_t answers;     /* since the window was followed last */
    bool was_full;        /* since then the window was the bound */
    uint64_t recent_ns[FLOW_RECENT];
    struct flow_mark marks[FLOW_MARKS];
};

enum flow_turn {
    FLOW_SEND,  /* go on with pages */
    FLOW_PROBE, /* send a mark alone, flow_probe() */
    FLOW_WAIT,  /* for an answer */
};

/* `unit`: the most that is sent in one go whatever the window is, in bytes. */
void flow_open(struct flow *f, uint64_t unit);
void flow_close(struct flow *f);
/* A new connection: nothing is on its way, nothing is known about it. */
void flow_restart(struct flow *f);

enum flow_turn flow_turn(struct flow *f, uint64_t now_ns);
/* `bytes` are sent now; true if the mark `*number` has to follow them. */
bool flow_send(struct flow *f, uint64_t bytes, uint64_t now_ns,
               uint32_t *number);
/* The number of a mark that is sent by itself. */
uint32_t flow_probe(struct flow *f, uint64_t now_ns);
/* How much arrives in so much time; bytes, 0 while nothing is known. */
uint64_t flow_bytes_in(struct flow *f, uint64_t ns);
/*
 * How long so many bytes keep the link busy: what answers took longer than the
 * base, by what was on its way in front of them. Lately, and rather too short
 * than too long, the more so the longer the way; ns, 0 while nothing is known.
 */
uint64_t flow_link_ns(struct flow *f, uint64_t bytes);
/* How much to send in one piece, so that the window is several of them. */
uint64_t flow_piece(struct flow *f);
/*
 * An answer, with the low 16 bits of the mark's number. False if no such mark
 * is on its way: the peer has made it up, and it changes nothing.
 */
bool flow_answer_untrusted(struct flow *f, uint32_t low, uint64_t now_ns);

/* For whoever looks on: bytes, ns. */
uint64_t flow_window(struct flow *f);
uint64_t flow_base_ns(struct flow *f);

#endif
