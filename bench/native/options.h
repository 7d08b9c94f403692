/* Numbers on the command line. */
#ifndef BENCH_OPTIONS_H
#define BENCH_OPTIONS_H

#include "fail.h"

#include <stdint.h>

/* Bytes, with K, M or G behind them for powers of 1024. */
bool option_size(const char *name, const char *text, uint64_t max,
                 uint64_t *size, struct fail *why);

bool option_count(const char *name, const char *text, unsigned max,
                  unsigned *count, struct fail *why);

#endif
