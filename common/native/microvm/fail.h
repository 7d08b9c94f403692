/*
 * How functions of microvm fail: they return false and leave one sentence.
 *
 *     if (fd < 0)
 *         return fail(why, "cannot open %s: %s", path, strerror(errno));
 */
#ifndef MICROVM_FAIL_H
#define MICROVM_FAIL_H

#include <stdbool.h>

struct fail {
    char text[512];
};

/* Always false. A sentence too long for the buffer is cut. */
bool fail(struct fail *why, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
