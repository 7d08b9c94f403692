#include "mapped.h"

#include "ram.h"
#include "zero.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#define BUFFER ((uint64_t)1 << 20)

/* Look at [from, to) of the block, or copy it, or what else there is to do. */
struct walk {
    const struct mapped *mapped;
    struct result (*run)(struct walk *w, uint64_t from, uint64_t to);
    uint8_t *buffer;
    int stop_fd;
    int to;          /* copying */
    bool in_kernel;  /* copying: the kernel has not refused to */
    bool punch;      /* stale */
    uint64_t *pages; /* stale */
};

static bool is_stopped(int stop_fd)
{
    struct pollfd stop = { .fd = stop_fd, .events = POLLIN };

    return stop_fd >= 0 && poll(&stop, 1, 0) > 0;
}

/* Every run of pages that are (not) data. */
static struct result walk_runs(struct walk *w, bool data)
{
    const struct bitmap *b = w->mapped->data;
    struct result r = result_ok();
    uint64_t page = 0;

    w->buffer = aligned_alloc(TARGET_PAGE_SIZE, BUFFER);
    if (!w->buffer) {
        return result_errno(RESULT_HOST, "memory for pages", ENOMEM);
    }
    while (RESULT_IS_OK(r)) {
        uint64_t first =
            data ? bitmap_next_set(b, page) : bitmap_next_clear(b, page);

        if (first >= b->bits) {
            break;
        }
        page = data ? bitmap_next_clear(b, first) : bitmap_next_set(b, first);
        r = is_stopped(w->stop_fd) ?
                result_of(RESULT_STOPPED, "") :
                w->run(w, first << TARGET_PAGE_BITS, page << TARGET_PAGE_BITS);
    }
    free(w->buffer);
    return r;
}

static struct result failed(const char *what, int err, uint64_t offset)
{
    struct result r = result_errno(RESULT_HOST, what, err);

    r.offset = offset;
    return r;
}

/* Fill the buffer from [from, from + length) of the block. */
static struct result read_pages(struct walk *w, uint64_t from, uint64_t length)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pread(w->mapped->fd, w->buffer + done, length - done,
                          (off_t)(w->mapped->start + from + done));

        if (n < 0 && errno != EINTR) {
            return failed("read of a mapped-ram file", errno, from + done);
        }
        if (n == 0) {
            return failed("mapped-ram file is cut off", 0, from + done);
        }
        done += n > 0 ? (uint64_t)n : 0;
    }
    return result_ok();
}

/* --- pages that are zero -------------------------------------------------- */

static struct result stale_page(struct walk *w, uint64_t offset)
{
    ++*w->pages;
    if (w->punch &&
        fallocate(w->mapped->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(w->mapped->start + offset),
                  (off_t)TARGET_PAGE_SIZE) < 0) {
        return failed("fallocate(PUNCH_HOLE) of a mapped-ram file", errno,
                      offset);
    }
    return result_ok();
}

/* [from, to) is no hole. */
static struct result stale_data(struct walk *w, uint64_t from, uint64_t to)
{
    struct result r = result_ok();

    while (from < to && RESULT_IS_OK(r)) {
        uint64_t length = to - from < BUFFER ? to - from : BUFFER;

        r = is_stopped(w->stop_fd) ? result_of(RESULT_STOPPED, "") :
                                     read_pages(w, from, length);
        for (uint64_t at = 0; at < length && RESULT_IS_OK(r);
             at += TARGET_PAGE_SIZE) {
            if (!page_is_zero(w->buffer + at)) {
                r = stale_page(w, from + at);
            }
        }
        from += length;
    }
    return r;
}

/* Where data begins at or behind `from`, `to` if not before it. */
static uint64_t next_data(const struct mapped *m, uint64_t from, uint64_t to)
{
    off_t data = lseek(m->fd, (off_t)(m->start + from), SEEK_DATA);

    if (data < 0) {
        return errno == ENXIO ? to : from;
    }
    from = ((uint64_t)data - m->start) & ~(TARGET_PAGE_SIZE - 1);
    return from < to ? from : to;
}

static uint64_t next_hole(const struct mapped *m, uint64_t from, uint64_t to)
{
    off_t hole = lseek(m->fd, (off_t)(m->start + from), SEEK_HOLE);
    uint64_t end = hole < 0 ? to : (uint64_t)hole - m->start;

    end = (end + TARGET_PAGE_SIZE - 1) & ~(TARGET_PAGE_SIZE - 1);
    return end < to ? end : to;
}

static struct result stale_run(struct walk *w, uint64_t from, uint64_t to)
{
    struct result r = result_ok();

    while (RESULT_IS_OK(r)) {
        from = next_data(w->mapped, from, to);
        if (from >= to) {
            break;
        }
        uint64_t end = next_hole(w->mapped, from, to);

        r = stale_data(w, from, end);
        from = end;
    }
    return r;
}

struct result mapped_stale(const struct mapped *m, bool punch, uint64_t *pages,
                           int stop_fd)
{
    struct walk w = {
        .mapped = m,
        .run = stale_run,
        .stop_fd = stop_fd,
        .punch = punch,
        .pages = pages,
    };

    *pages = 0;
    return walk_runs(&w, false);
}

/* --- pages that are data -------------------------------------------------- */

static struct result write_pages(struct walk *w, uint64_t from, uint64_t length)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pwrite(w->to, w->buffer + done, length - done,
                           (off_t)(from + done));

        if (n < 0 && errno != EINTR) {
            return failed("write of stored RAM", errno, from + done);
        }
        done += n > 0 ? (uint64_t)n : 0;
    }
    return result_ok();
}

static struct result copy_through_buffer(struct walk *w, uint64_t from,
                                         uint64_t to)
{
    struct result r = result_ok();

    while (from < to && RESULT_IS_OK(r)) {
        uint64_t length = to - from < BUFFER ? to - from : BUFFER;

        r = is_stopped(w->stop_fd) ? result_of(RESULT_STOPPED, "") :
                                     read_pages(w, from, length);
        if (RESULT_IS_OK(r)) {
            r = write_pages(w, from, length);
        }
        from += length;
    }
    return r;
}

/* What a kernel or a file system says that cannot copy between these two. */
static bool is_refusal(int err)
{
    return err == EXDEV || err == EOPNOTSUPP || err == EINVAL ||
           err == ENOSYS || err == EBADF || err == ETXTBSY;
}

static struct result copy_run(struct walk *w, uint64_t from, uint64_t to)
{
    while (w->in_kernel && from < to) {
        off_t in = (off_t)(w->mapped->start + from);
        off_t out = (off_t)from;
        ssize_t n;

        if (is_stopped(w->stop_fd)) {
            return result_of(RESULT_STOPPED, "");
        }
        n = copy_file_range(w->mapped->fd, &in, w->to, &out, to - from, 0);
        if (n == 0 || (n < 0 && is_refusal(errno))) {
            w->in_kernel = false;
        } else if (n < 0 && errno != EINTR) {
            return failed("copy of a mapped-ram file", errno, from);
        }
        from += n > 0 ? (uint64_t)n : 0;
    }
    return copy_through_buffer(w, from, to);
}

struct result mapped_copy(const struct mapped *m, int to, int stop_fd)
{
    struct walk w = {
        .mapped = m,
        .run = copy_run,
        .stop_fd = stop_fd,
        .to = to,
        .in_kernel = true,
    };

    return walk_runs(&w, true);
}
