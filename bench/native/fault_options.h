/* The command line of limit_fault. */
#ifndef BENCH_FAULT_OPTIONS_H
#define BENCH_FAULT_OPTIONS_H

#include "limit_guest.h"

struct fault_options {
    struct limit_guest_options guest;
    bool background;
    bool relay;
    const char *reports; /* directory; NULL: none are kept */
    uint64_t rate;       /* of the background, bytes per second; 0: no limit */
    uint64_t faults;     /* 0: all of them */
    unsigned seconds;    /* 0: no limit */
};

/* False also for words that are not known; the sentence is then the help. */
bool fault_options_parse(int argc, char **argv, struct fault_options *o,
                         struct fail *why);

#endif
