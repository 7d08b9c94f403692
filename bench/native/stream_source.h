/* The sender of limit_stream: a process of its own with memory full of data. */
#ifndef BENCH_STREAM_SOURCE_H
#define BENCH_STREAM_SOURCE_H

#include "fail.h"

#include <stdint.h>

struct stream_source {
    uint64_t length;        /* bytes, a multiple of 2 MiB */
    unsigned batch;         /* pages for each system call; divides 512 */
    const char *congestion; /* NULL: as the machine has it */
};

/* What the sender tells when it has sent everything. */
struct stream_account {
    double cpu_seconds;
};

/*
 * Serve one connection of `listener`: a byte when the memory is full, then wait
 * for a byte, send all pages, and a struct stream_account.
 */
bool stream_source_run(const struct stream_source *s, int listener,
                       struct fail *why);

/* What every page holds as its first and its last word. */
uint64_t stream_word(uint64_t page);

#endif
