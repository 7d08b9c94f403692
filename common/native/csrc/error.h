/*
 * What a native function reports: one small struct, returned by value.
 *
 * The kinds are branched by who can do something about it, like the Python
 * exceptions in common/errors.py that they become in native/loop.py.
 */
#ifndef POSTCOPY_ERROR_H
#define POSTCOPY_ERROR_H

#include <stdbool.h>
#include <stdint.h>

enum result_kind {
    RESULT_OK = 0,
    RESULT_STOPPED, /* the stop descriptor was written */
    RESULT_CLOSED,  /* the peer closed the channel; not always an error */
    RESULT_CHANNEL, /* the network failed: err says how */
    RESULT_STREAM,  /* the peer sent what the format forbids */
    RESULT_HOST,    /* the kernel refused: err says how */
    RESULT_GUEST,   /* the guest's process is gone */
};

struct result {
    int32_t kind;     /* enum result_kind */
    int32_t err;      /* errno, 0 if there is none */
    const char *what; /* constant text: the step that failed */
    uint64_t offset;  /* bytes into the channel, or into the RAM block */
    uint64_t got;     /* the value that was refused, if any */
};

#define RESULT_IS_OK(r) ((r).kind == RESULT_OK)

struct result result_ok(void);
struct result result_of(enum result_kind kind, const char *what);
struct result result_errno(enum result_kind kind, const char *what, int err);
struct result result_stream(const char *what, uint64_t offset, uint64_t got);

#endif
