/*
 * A source of two blocks whose pages are known, and what came of them: for the
 * tests of the loops that send pages.
 */
#ifndef PUMPING_H
#define PUMPING_H

#include "rpath.h"

#include "check.h"
#include "support.h"

#define SECTION 3

enum { SMALL, MIXED };

/* A source whose channels are read by walkers. */
struct fixture {
    struct guest guest;
    struct source source;
    struct line main;
    struct line preempt;
    struct walker walkers[2];
    struct job readers[2];
};

/* Which pages came, against a copy of the bitmap that said which shall. */
struct expectation {
    bool *pages[2];
};

/* Two of three pages hold data, one is zero; every 16th group is a hole. */
bool has_data(uint64_t page);

void fixture_open(struct fixture *f, int layout, bool preempt);
void fixture_close(struct fixture *f);
struct ram_block *block(struct fixture *f, uint32_t i);

void dirty_all(struct fixture *f);
/* About one page in `n`; returns how many. */
uint64_t dirty_some(struct fixture *f, uint64_t n);

/* What comes of the pages that are owed, else of those that are dirty. */
struct expectation expect(struct fixture *f, bool owed);
/* Each expected page once, with its contents, and no other. */
bool came_exactly_once(struct fixture *f, struct expectation *e);

void start_readers(struct fixture *f, bool postcopy);
/* The streams end; were they well formed? */
bool finish_readers(struct fixture *f);
void wait_for_records(struct walker *w, uint64_t records);

/* Loops on a `struct source`, for job_start(). */
struct result run_postcopy(void *source);
struct result run_rpath(void *source);

/* What the destination says. */
void request(struct fixture *f, uint32_t i, uint64_t host);
void request_some(struct fixture *f, uint64_t *random, int count);
void send_shut(struct fixture *f);

/* The end of RAM, on main. */
void send_end(struct fixture *f);

#endif
