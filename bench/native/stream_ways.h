/* The ways from a TCP connection into a guest's memory. */
#ifndef BENCH_STREAM_WAYS_H
#define BENCH_STREAM_WAYS_H

#include "records.h"

/*
 * One file of memory mapped twice: `own` is where the receiver may touch it,
 * `guest` stands for the guest and is watched by `userfaultfd`.
 */
struct landing {
    uint64_t length;
    int file;
    int userfaultfd;
    uint8_t *own;
    uint8_t *guest;
    uint8_t *buffer; /* RECORDS_MAX pages */
    struct records records;
};

struct way {
    const char *name;
    /* Before the guest's memory is watched; NULL: nothing to do. */
    bool (*prepare)(struct landing *l, struct fail *why);
    /* Pages `first` and following: from the connection to the guest. */
    bool (*take)(struct landing *l, int fd, uint64_t first, size_t count,
                 struct fail *why);
    unsigned batch; /* pages for each call of take(); divides 512 */
    bool keeps;     /* what is taken is in the guest's memory afterwards */
};

/* NULL if there is none of this name. */
const struct way *way_find(const char *name);

/* All names with commas between them. */
const char *way_names(void);

bool landing_create(struct landing *l, uint64_t length, struct fail *why);
bool landing_watch(struct landing *l, struct fail *why);

/* Pages that don't hold what stream_source sends. The watch ends. */
bool landing_count_wrong(struct landing *l, uint64_t *wrong, struct fail *why);

#endif
