#include "stream_ways.h"
#include "placing.h"
#include "stream_source.h"
#include "tcp.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Header files of long-term distributions may lack these. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Preparing */

/* A block without any page can't be collapsed, so it gets one first. */
static bool prepare_huge(struct landing *l, struct fail *why)
{
    for (uint64_t at = 0; at < l->length; at += HUGE_PAGE) {
        l->own[at] = 1;
        if (madvise(l->own + at, HUGE_PAGE, MADV_COLLAPSE) < 0)
            return fail(why, "cannot collapse the block at %llu: %s",
                        (unsigned long long)at, strerror(errno));
    }
    return true;
}

static bool prepare_small(struct landing *l, struct fail *why)
{
    if (madvise(l->own, l->length, MADV_POPULATE_WRITE) < 0)
        return fail(why, "cannot populate the memory: %s", strerror(errno));
    return true;
}

/* Receiving */

static bool receive_at(struct landing *l, int fd, uint64_t first, size_t count,
                       uint8_t *bytes, struct fail *why)
{
    size_t parts = records_lay_out(&l->records, first, bytes, count);

    memset(l->records.heads, 0xff, count * sizeof(l->records.heads[0]));
    return tcp_receive(fd, l->records.parts, parts, why) &&
           records_are(&l->records, first, count, why);
}

static bool show(const struct landing *l, uint64_t first, size_t count,
                 struct fail *why)
{
    return place_continue(l->userfaultfd, l->guest + first * SMALL_PAGE,
                          count * SMALL_PAGE, SMALL_PAGE, why);
}

/* The ways */

static bool discard(struct landing *l, int fd, uint64_t first, size_t count,
                    struct fail *why)
{
    (void)first;
    return tcp_receive_bytes(
        fd, l->buffer, count * (SMALL_PAGE + sizeof(l->records.heads[0])), why);
}

static bool copy(struct landing *l, int fd, uint64_t first, size_t count,
                 struct fail *why)
{
    return receive_at(l, fd, first, count, l->buffer, why) &&
           place_copy(l->userfaultfd, l->guest + first * SMALL_PAGE, l->buffer,
                      count * SMALL_PAGE, SMALL_PAGE, why);
}

static bool write_file(struct landing *l, int fd, uint64_t first, size_t count,
                       struct fail *why)
{
    size_t length = count * SMALL_PAGE;

    if (!receive_at(l, fd, first, count, l->buffer, why))
        return false;
    if (pwrite(l->file, l->buffer, length, (off_t)(first * SMALL_PAGE)) !=
        (ssize_t)length)
        return fail(why, "cannot write to the memfd: %s", strerror(errno));
    return show(l, first, count, why);
}

static bool in_place(struct landing *l, int fd, uint64_t first, size_t count,
                     struct fail *why)
{
    return receive_at(l, fd, first, count, l->own + first * SMALL_PAGE, why) &&
           show(l, first, count, why);
}

static bool through_buffer(struct landing *l, int fd, uint64_t first,
                           size_t count, struct fail *why)
{
    if (!receive_at(l, fd, first, count, l->buffer, why))
        return false;
    memcpy(l->own + first * SMALL_PAGE, l->buffer, count * SMALL_PAGE);
    return show(l, first, count, why);
}

/* clang-format off */
static const struct way ways[] = {
    { "discard",    NULL,          discard,        256, false },
    { "copy",       NULL,          copy,           256, true },
    { "fresh",      NULL,          write_file,     256, true },
    { "inplace-2m", prepare_huge,  in_place,       256, true },
    { "inplace-4k", prepare_small, in_place,       256, true },
    { "buffer-2m",  prepare_huge,  through_buffer,  64, true },
    { "write-2m",   prepare_huge,  write_file,     256, true },
};
/* clang-format on */

const struct way *way_find(const char *name)
{
    for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
        if (strcmp(name, ways[i].name) == 0)
            return &ways[i];
    }
    return NULL;
}

const char *way_names(void)
{
    return "discard, copy, fresh, inplace-2m, inplace-4k, buffer-2m, write-2m";
}

/* The memory */

bool landing_create(struct landing *l, uint64_t length, struct fail *why)
{
    *l = (struct landing){ .length = length };
    l->buffer = mmap(NULL, RECORDS_MAX * (SMALL_PAGE + sizeof(uint64_t)),
                     PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (l->buffer == MAP_FAILED)
        return fail(why, "no memory for a buffer: %s", strerror(errno));
    l->file = memory_file(length, why);
    if (l->file < 0)
        return false;
    l->own = memory_map(l->file, length, why);
    l->guest = l->own ? memory_map(l->file, length, why) : NULL;
    if (!l->guest)
        return false;
    l->userfaultfd = place_open(why);
    return l->userfaultfd >= 0;
}

bool landing_watch(struct landing *l, struct fail *why)
{
    return place_watch(l->userfaultfd, l->guest, l->length, why);
}

/* Unwatched, a page that is missing reads as zeroes, so nothing waits. */
bool landing_count_wrong(struct landing *l, uint64_t *wrong, struct fail *why)
{
    if (!place_unwatch(l->userfaultfd, l->guest, l->length, why))
        return false;
    *wrong = 0;
    for (uint64_t page = 0; page < l->length / SMALL_PAGE; page++) {
        const uint64_t *words =
            (const uint64_t *)(l->guest + page * SMALL_PAGE);
        uint64_t expected = stream_word(page);

        if (words[0] != expected ||
            words[SMALL_PAGE / sizeof(*words) - 1] != expected)
            (*wrong)++;
    }
    return true;
}
