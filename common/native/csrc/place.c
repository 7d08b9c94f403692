#include "place.h"

#include "limit.h"
#include "prepare.h"
#include "uffd.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

/* A resolved fault maps its neighbours in this many bytes too. */
#define NEIGHBOURHOOD ((uint64_t)64 << 10)
#define SWEEP_CHUNK ((uint64_t)2 << 20)

/* --- bytes into the file ------------------------------------------------ */

static struct result write_file(struct ram_block *b, uint64_t offset,
                                struct iovec *iov, uint32_t count)
{
    while (count) {
        int n = count > IOV_MAX ? IOV_MAX : (int)count;
        ssize_t done = pwritev(b->fd, iov, n, (off_t)offset);

        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done < 0) {
            struct result r =
                result_errno(RESULT_HOST, "writing to a RAM block", errno);

            r.offset = offset;
            return r;
        }
        offset += (uint64_t)done;
        while (count && (size_t)done >= iov->iov_len) {
            done -= (ssize_t)iov->iov_len;
            iov++;
            count--;
        }
        if (count && done) {
            iov->iov_base = (uint8_t *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return result_ok();
}

static struct result write_zeroes(struct destination *d, struct ram_block *b,
                                  uint64_t offset, uint64_t length)
{
    struct iovec iov = { .iov_base = d->zeroes, .iov_len = (size_t)length };

    if (prepared_at(b, offset >> b->host_bits)) {
        memset(b->map + offset, 0, (size_t)length);
        return result_ok();
    }
    return write_file(b, offset, &iov, 1);
}

static void copy_to_map(struct ram_block *b, uint64_t offset,
                        const struct iovec *iov, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        memcpy(b->map + offset, iov[i].iov_base, iov[i].iov_len);
        offset += iov[i].iov_len;
    }
}

/* `iov` is a run of pages: it does not leave its chunk. */
static struct result fill_pages(struct ram_block *b, uint64_t page,
                                struct iovec *iov, uint32_t count)
{
    uint64_t offset = page << TARGET_PAGE_BITS;

    if (!prepared_at(b, page >> block_pages_bits(b))) {
        return write_file(b, offset, iov, count);
    }
    copy_to_map(b, offset, iov, count);
    return result_ok();
}

struct result place_early(struct destination *d, struct ram_block *b,
                          uint64_t page, struct iovec *iov, uint32_t count)
{
    uint64_t host = page >> block_pages_bits(b);
    uint64_t last = (page + count - 1) >> block_pages_bits(b);
    struct result r;

    (void)d;
    bitmap_set_range(&b->populated, host, last - host + 1);
    r = fill_pages(b, page, iov, count);
    if (RESULT_IS_OK(r)) {
        bitmap_set_range(&b->received, page, count);
    }
    return r;
}

struct result place_early_zero(struct destination *d, struct ram_block *b,
                               uint64_t page)
{
    struct result r = result_ok();

    if (bitmap_test(&b->populated, page >> block_pages_bits(b))) {
        r = write_zeroes(d, b, page << TARGET_PAGE_BITS, TARGET_PAGE_SIZE);
    }
    bitmap_test_and_set(&b->received, page);
    return r;
}

/* --- postcopy ----------------------------------------------------------- */

static uint64_t address_of(const struct ram_block *b, uint64_t host)
{
    return b->base + (host << b->host_bits);
}

bool place_claim(struct destination *d, struct ram_block *b, uint64_t host)
{
    if (bitmap_test_and_set(&b->claimed, host)) {
        STATS_ADD(d->stats.duplicate_pages, block_pages_per_host(b));
        return false;
    }
    return true;
}

static void mark_received(struct ram_block *b, uint64_t host, uint64_t count)
{
    bitmap_set_range(&b->received, host << block_pages_bits(b),
                     count << block_pages_bits(b));
}

/* When a page came, if anybody waits; else nobody wants to know. */
static struct arrival arrive(const struct destination *d)
{
    struct arrival at = { 0 };

    if (waiting_any(&d->waiting)) {
        at.came_ns = clock_ns();
    }
    return at;
}

static void arrival_filled(struct arrival *at)
{
    if (at->came_ns) {
        at->filled_ns = clock_ns();
    }
}

/* The guest can use these: nobody waits for them any more. */
static void account(struct destination *d, struct ram_block *b, uint64_t host,
                    uint64_t count, const struct arrival *at)
{
    waiting_end(&d->waiting, b, host, count, at);
    if (__atomic_sub_fetch(&d->missing, count, __ATOMIC_SEQ_CST) == 0) {
        destination_note_complete(d);
    }
}

/*
 * A page that is a hole again was given back by the guest (a balloon) before it
 * was mapped: whoever waits for it faults again and finds the hole.
 */
static struct result map_range(struct destination *d, struct ram_block *b,
                               uint64_t host, uint64_t count)
{
    uint64_t end = host + count;

    while (host < end) {
        struct result r =
            uffd_continue(d->uffd, address_of(b, host),
                          (end - host) << b->host_bits, b->page_size);
        uint64_t done = RESULT_IS_OK(r) ? end - host : r.offset >> b->host_bits;

        bitmap_set_range(&b->mapped, host, done);
        host += done;
        if (!RESULT_IS_OK(r)) {
            if (r.kind != RESULT_HOST || r.err != EFAULT) {
                return r;
            }
            bitmap_test_and_clear(&b->populated, host);
            (void)uffd_wake(d->uffd, address_of(b, host), b->page_size);
            host++;
        }
    }
    return result_ok();
}

static struct result copy_pages(struct destination *d, struct ram_block *b,
                                uint64_t host, const struct iovec *iov,
                                uint32_t count, struct arrival *at)
{
    for (uint32_t i = 0; i < count; i++) {
        struct result r =
            uffd_copy(d->uffd, address_of(b, host + i), iov[i].iov_base,
                      b->page_size, b->page_size);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    arrival_filled(at); /* and the guest was woken in the same step */
    mark_received(b, host, count);
    return result_ok();
}

static struct result write_pages(struct destination *d, struct ram_block *b,
                                 uint64_t host, struct iovec *iov,
                                 uint32_t count, struct arrival *at)
{
    struct result r;

    bitmap_set_range(&b->populated, host, count);
    r = fill_pages(b, host, iov, count);
    if (!RESULT_IS_OK(r)) {
        return r;
    }
    arrival_filled(at);
    mark_received(b, host, count);
    return d->way == PLACE_CONTINUE ? map_range(d, b, host, count) : r;
}

struct result place_pages(struct destination *d, struct ram_block *b,
                          uint64_t host, struct iovec *iov, uint32_t count)
{
    struct arrival at = arrive(d);
    struct result r = d->way == PLACE_COPY ?
                          copy_pages(d, b, host, iov, count, &at) :
                          write_pages(d, b, host, iov, count, &at);

    if (RESULT_IS_OK(r)) {
        account(d, b, host, count, &at);
    }
    return r;
}

/* The page is here and a hole: make it a page of zeroes in the guest. */
static struct result resolve_hole(struct destination *d, struct ram_block *b,
                                  uint64_t host)
{
    if (!block_is_huge(b)) {
        struct result r =
            uffd_zero(d->uffd, address_of(b, host), b->page_size, b->page_size);

        /* Unmapped some day (swap), its fault needs a CONTINUE. */
        bitmap_test_and_set(&b->populated, host);
        return r;
    }
    /* hugetlbfs has no UFFDIO_ZEROPAGE. */
    if (d->way == PLACE_COPY) {
        return uffd_copy(d->uffd, address_of(b, host), d->zeroes, b->page_size,
                         b->page_size);
    }
    *(volatile uint8_t *)(b->map + (host << b->host_bits));
    bitmap_test_and_set(&b->populated, host);
    return map_range(d, b, host, 1);
}

struct result place_zero(struct destination *d, struct ram_block *b,
                         uint64_t host)
{
    bool stale = bitmap_test(&b->populated, host);
    struct arrival at = arrive(d);
    struct result r = result_ok();

    if (stale && d->way != PLACE_COPY) {
        r = write_zeroes(d, b, host << b->host_bits, b->page_size);
    }
    if (!RESULT_IS_OK(r)) {
        return r;
    }
    arrival_filled(&at);
    mark_received(b, host, 1);
    if (d->way != PLACE_FILE && bitmap_test(&b->requested, host)) {
        r = place_resolve(d, b, host);
    }
    if (RESULT_IS_OK(r)) {
        account(d, b, host, 1, &at);
    }
    return r;
}

uint8_t *place_huge_at(struct destination *d, struct ram_block *b,
                       uint64_t host, uint8_t *scratch)
{
    return d->way == PLACE_COPY ? scratch : b->map + (host << b->host_bits);
}

struct result place_huge(struct destination *d, struct ram_block *b,
                         uint64_t host, const uint8_t *data)
{
    struct iovec iov = { .iov_base = (void *)(uintptr_t)data,
                         .iov_len = (size_t)b->page_size };
    struct arrival at = arrive(d);
    struct result r = result_ok();

    if (d->way == PLACE_COPY) {
        r = copy_pages(d, b, host, &iov, 1, &at);
    } else {
        bitmap_test_and_set(&b->populated, host);
        mark_received(b, host, 1);
        arrival_filled(&at);
        if (d->way == PLACE_CONTINUE) {
            r = map_range(d, b, host, 1);
        }
    }
    if (RESULT_IS_OK(r)) {
        account(d, b, host, 1, &at);
    }
    return r;
}

/* Here, in the file, and not known to be mapped: worth a UFFDIO_CONTINUE. */
static bool can_map(const struct ram_block *b, uint64_t host)
{
    return place_is_here(b, host) && bitmap_test(&b->populated, host) &&
           !bitmap_test(&b->mapped, host);
}

/* Map every run of pages in [host, end) that can be. */
static struct result map_runs(struct destination *d, struct ram_block *b,
                              uint64_t host, uint64_t end)
{
    while (host < end) {
        uint64_t first = host;
        struct result r;

        while (host < end && can_map(b, host)) {
            host++;
        }
        if (host == first) {
            host++;
            continue;
        }
        r = map_range(d, b, first, host - first);
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

/*
 * destination_finish() unregisters the blocks while the sweep or the fault loop
 * may still be at work. From then on the kernel maps the pages by itself.
 */
static struct result unless_finished(const struct destination *d,
                                     struct result r)
{
    bool finished = !__atomic_load_n(&d->listening, __ATOMIC_SEQ_CST);

    return finished && r.err == ENOENT ? result_ok() : r;
}

static struct result resolve(struct destination *d, struct ram_block *b,
                             uint64_t host)
{
    uint64_t around = NEIGHBOURHOOD >> b->host_bits;
    struct result r;

    if (d->way == PLACE_COPY || !bitmap_test(&b->populated, host)) {
        return resolve_hole(d, b, host);
    }
    /* Whether it is mapped or not: this wakes who waits. */
    r = map_range(d, b, host, 1);
    if (RESULT_IS_OK(r) && !bitmap_test(&b->populated, host)) {
        return resolve_hole(d, b, host);
    }
    if (RESULT_IS_OK(r) && around > 1) {
        uint64_t first = host / around * around;
        uint64_t end = first + around;

        r = map_runs(d, b, first, end < block_hosts(b) ? end : block_hosts(b));
    }
    return r;
}

struct result place_resolve(struct destination *d, struct ram_block *b,
                            uint64_t host)
{
    return unless_finished(d, resolve(d, b, host));
}

static bool readable(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    return poll(&p, 1, 0) > 0;
}

static struct result sweep_block(struct destination *d, struct ram_block *b,
                                 int stop_fd)
{
    uint64_t chunk = SWEEP_CHUNK >> b->host_bits;
    uint64_t hosts = block_hosts(b);

    for (uint64_t host = 0; host < hosts; host += chunk) {
        uint64_t end = host + chunk < hosts ? host + chunk : hosts;
        struct result r = unless_finished(d, map_runs(d, b, host, end));

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        if (readable(stop_fd)) {
            return result_of(RESULT_STOPPED, "stopped");
        }
    }
    return result_ok();
}

struct result place_sweep(struct destination *d, int stop_fd)
{
    if (d->way != PLACE_CONTINUE) {
        return result_ok();
    }
    for (uint32_t i = 0; i < d->ram->count; i++) {
        struct result r = sweep_block(d, &d->ram->blocks[i], stop_fd);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}
