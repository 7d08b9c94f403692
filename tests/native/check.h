/*
 * The smallest test frame: a test is a function, a program runs several.
 *
 *     static void test_one_bit(void)
 *     {
 *         CHECK_EQ(bitmap_count(&b), 1);
 *     }
 *
 *     int main(void)
 *     {
 *         RUN(test_one_bit);
 *         return check_status();
 *     }
 *
 * A failed check says where and with which values, and ends its test by
 * returning from the function it stands in; the other tests still run. In a
 * thread or a helper that returns a value use CHECK_SOFT, which only reports.
 */
#ifndef TESTS_NATIVE_CHECK_H
#define TESTS_NATIVE_CHECK_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* Checks that failed so far; threads count, too. */
static unsigned check_failures;

static inline bool check_report(bool ok, const char *file, int line,
                                const char *what)
{
    if (!ok) {
        __atomic_add_fetch(&check_failures, 1, __ATOMIC_RELAXED);
        fprintf(stderr, "%s:%d: %s\n", file, line, what);
    }
    return ok;
}

static inline bool check_equal(uint64_t a, uint64_t b, const char *file,
                               int line, const char *what)
{
    if (!check_report(a == b, file, line, what)) {
        fprintf(stderr,
                "    %" PRIu64 " (%#" PRIx64 ") and %" PRIu64 " (%#" PRIx64
                ")\n",
                a, a, b, b);
    }
    return a == b;
}

static inline bool check_text(const char *a, const char *b, const char *file,
                              int line, const char *what)
{
    bool ok = a && b && strcmp(a, b) == 0;

    if (!check_report(ok, file, line, what)) {
        fprintf(stderr, "    \"%s\" and \"%s\"\n", a ? a : "(null)",
                b ? b : "(null)");
    }
    return ok;
}

static inline void check_run(void (*test)(void), const char *name)
{
    unsigned before = __atomic_load_n(&check_failures, __ATOMIC_RELAXED);
    unsigned after;

    test();
    after = __atomic_load_n(&check_failures, __ATOMIC_RELAXED);
    printf("%s %s\n", before == after ? "ok    " : "FAILED", name);
    fflush(stdout);
}

/* What main() returns. */
static inline int check_status(void)
{
    return __atomic_load_n(&check_failures, __ATOMIC_RELAXED) != 0;
}

/* What main() returns instead when the machine can't run the tests at all. */
static inline int check_skip(const char *reason)
{
    printf("skipped: %s\n", reason);
    return 77; /* meson's number for it */
}

#define CHECK_SOFT(condition) \
    check_report((condition), __FILE__, __LINE__, #condition)

#define CHECK(condition)            \
    do {                            \
        if (!CHECK_SOFT(condition)) \
            return;                 \
    } while (0)

/* Integers of any type; a negative one equals itself only. */
#define CHECK_EQ(a, b)                                                     \
    do {                                                                   \
        if (!check_equal((uint64_t)(a), (uint64_t)(b), __FILE__, __LINE__, \
                         #a " == " #b))                                    \
            return;                                                        \
    } while (0)

#define CHECK_TEXT(a, b)                                             \
    do {                                                             \
        if (!check_text((a), (b), __FILE__, __LINE__, #a " is " #b)) \
            return;                                                  \
    } while (0)

#define CHECK_BYTES(a, b, length) CHECK(memcmp((a), (b), (length)) == 0)

#define RUN(test) check_run(test, #test)

#endif
