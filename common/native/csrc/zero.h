/* Is a target page all zero? Reads up to its first non-zero word. */
#ifndef POSTCOPY_ZERO_H
#define POSTCOPY_ZERO_H

#include <stdbool.h>

bool page_is_zero(const void *page);

#endif
