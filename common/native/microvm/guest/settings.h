/*
 * The guest's command line: words with spaces between them. An unknown word is
 * left alone, so that a VMM may add its own.
 *
 *     area=SIZE        bytes of memory to work on; most of the RAM without it
 *     seed=N           of the contents and of the order of accesses
 *     write-rate=SIZE  bytes to write each second, all vCPUs together;
 *                      0, the default: as fast as it goes
 *     read-only        check pages, never write them again
 *     idle             fill the memory, then do nothing but count
 *     sweep=N          every Nth access takes the next page in order instead
 *                      of a random one, so that each page has its turn; 0: none
 *     rest=halt        rest by halting the vCPU; microvm's nap port without it
 *     vcpus=N          how many vCPUs there are (microvm adds this)
 *     tsc-khz=N        speed of the time stamp counter (microvm adds this)
 *
 * SIZE is a number of bytes, with K, M or G behind it for powers of 1024.
 */
#ifndef GUEST_SETTINGS_H
#define GUEST_SETTINGS_H

#include "report.h"

#include <stdbool.h>

struct settings {
    uint64_t area; /* bytes; 0: most of the RAM */
    uint64_t seed;
    uint64_t write_rate;
    uint64_t sweep;
    uint64_t tsc_khz; /* 0: not said */
    uint32_t vcpus;
    uint32_t mode; /* enum report_mode */
    bool halt;
};

struct settings settings_parse(const char *line);

#endif
