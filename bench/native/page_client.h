/*
 * The destination at its least: one thread that fetches the pages a guest
 * waits for, and one that takes in all the others. Each has a connection of
 * its own to a page server.
 */
#ifndef BENCH_PAGE_CLIENT_H
#define BENCH_PAGE_CLIENT_H

#include "page_server.h"

#include <pthread.h>
#include <stddef.h>

#define PAGE_SAMPLES 64u

/* How much of the area had come in after so many seconds. */
struct page_sample {
    double seconds;
    uint64_t bytes;
};

/* The guest's side, for both threads. */
struct page_target {
    uint8_t *base; /* of offset 0 */
    int userfaultfd;
    uint64_t start; /* offsets of the watched area */
    uint64_t end;
    uint32_t page_size;
};

/* A thread's fields belong to it until it is joined. */
struct page_fetcher {
    struct page_target target;
    int connection;
    int stop;           /* eventfd: end when it is readable */
    int finished;       /* eventfd: written at the end */
    uint64_t limit;     /* faults to end after; 0: none */
    uint64_t faults;    /* resolved */
    double cpu_seconds; /* of the thread */
    uint8_t *page;
    bool good;
    struct fail why; /* if not good */
    pthread_t thread;
};

struct page_filler {
    struct page_target target;
    int connection;
    int finished;
    double started;
    double cpu_seconds;
    uint8_t *buffer;
    size_t sample_count;
    struct page_sample samples[PAGE_SAMPLES];
    bool good;
    struct fail why;
    pthread_t thread;
};

/*
 * Make both ready, then start them. The filler is optional. Stop the fetcher
 * with an eventfd_write to `stop`.
 */
bool page_fetcher_open(struct page_fetcher *f, const struct page_target *t,
                       const struct page_server *s, struct fail *why);
bool page_filler_open(struct page_filler *f, const struct page_target *t,
                      uint64_t rate, const struct page_server *s,
                      struct fail *why);
bool page_fetcher_start(struct page_fetcher *f, struct fail *why);
bool page_filler_start(struct page_filler *f, struct fail *why);

/* Wait for the end of the thread. False if it failed. */
bool page_fetcher_join(struct page_fetcher *f, struct fail *why);
bool page_filler_join(struct page_filler *f, struct fail *why);

#endif
