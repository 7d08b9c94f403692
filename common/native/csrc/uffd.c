#include "uffd.h"

#include <errno.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

/*
 * From the kernel's include/uapi/linux/userfaultfd.h; header files of long-term
 * distributions lack the newer ones.
 */
#define FEATURE_MISSING_HUGETLBFS (UINT64_C(1) << 4)
#define FEATURE_MISSING_SHMEM (UINT64_C(1) << 5)
#define FEATURE_THREAD_ID (UINT64_C(1) << 8)
#define FEATURE_MINOR_HUGETLBFS (UINT64_C(1) << 9)
#define FEATURE_MINOR_SHMEM (UINT64_C(1) << 10)
#define FEATURE_WP_HUGETLBFS_SHMEM (UINT64_C(1) << 12)
#define FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
#define FEATURE_WP_ASYNC (UINT64_C(1) << 15)

#define MISSING (FEATURE_MISSING_HUGETLBFS | FEATURE_MISSING_SHMEM)
#define MINOR (FEATURE_MINOR_HUGETLBFS | FEATURE_MINOR_SHMEM)
#define WP_ASYNC \
    (FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)

struct continue_arg {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};
#define IOCTL_CONTINUE _IOWR(UFFDIO, 0x07, struct continue_arg)

/* Best first. A kernel refuses a set as a whole if it lacks one of it. */
static const struct {
    uint64_t features;
    uint32_t abilities;
} offers[] = {
    { MISSING | FEATURE_THREAD_ID | MINOR | WP_ASYNC,
      UFFD_CAN_MISSING | UFFD_CAN_THREAD_ID | UFFD_CAN_MINOR |
          UFFD_CAN_WP_ASYNC },
    { MISSING | FEATURE_THREAD_ID | MINOR,
      UFFD_CAN_MISSING | UFFD_CAN_THREAD_ID | UFFD_CAN_MINOR },
    { MISSING | FEATURE_THREAD_ID, UFFD_CAN_MISSING | UFFD_CAN_THREAD_ID },
    { MISSING, UFFD_CAN_MISSING },
};

struct result uffd_negotiate(int uffd, uint32_t *abilities)
{
    for (size_t i = 0; i < sizeof(offers) / sizeof(offers[0]); i++) {
        struct uffdio_api api = { .api = UFFD_API,
                                  .features = offers[i].features };

        if (ioctl(uffd, UFFDIO_API, &api) == 0) {
            *abilities = offers[i].abilities;
            return result_ok();
        }
        if (errno != EINVAL) {
            break;
        }
    }
    return result_errno(RESULT_HOST, "UFFDIO_API", errno);
}

struct result uffd_register(int uffd, uint64_t start, uint64_t length,
                            uint32_t modes)
{
    struct uffdio_register reg = {
        .range = { .start = start, .len = length },
        .mode = modes,
    };

    if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0) {
        return result_errno(RESULT_HOST, "UFFDIO_REGISTER", errno);
    }
    return result_ok();
}

struct result uffd_unregister(int uffd, uint64_t start, uint64_t length)
{
    struct uffdio_range range = { .start = start, .len = length };

    if (ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0) {
        return result_errno(RESULT_HOST, "UFFDIO_UNREGISTER", errno);
    }
    return result_ok();
}

struct result uffd_protect(int uffd, uint64_t start, uint64_t length)
{
    struct uffdio_writeprotect wp = {
        .range = { .start = start, .len = length },
        .mode = UFFDIO_WRITEPROTECT_MODE_WP,
    };

    while (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) < 0) {
        if (errno != EAGAIN && errno != EINTR) {
            return result_errno(errno == ESRCH ? RESULT_GUEST : RESULT_HOST,
                                "UFFDIO_WRITEPROTECT", errno);
        }
    }
    return result_ok();
}

struct result uffd_wake(int uffd, uint64_t start, uint64_t length)
{
    struct uffdio_range range = { .start = start, .len = length };

    if (ioctl(uffd, UFFDIO_WAKE, &range) < 0) {
        return result_errno(RESULT_HOST, "UFFDIO_WAKE", errno);
    }
    return result_ok();
}

/*
 * One place ioctl and what it got done. `done` < 0 with EAGAIN: the guest is
 * changing its mappings, nothing was done.
 */
typedef int place_once(int uffd, uint64_t start, const void *from,
                       uint64_t length, int64_t *done);

static int copy_once(int uffd, uint64_t start, const void *from,
                     uint64_t length, int64_t *done)
{
    struct uffdio_copy arg = { .dst = start,
                               .len = length,
                               .src = (uint64_t)(uintptr_t)from };
    int n = ioctl(uffd, UFFDIO_COPY, &arg);

    *done = arg.copy;
    return n;
}

static int zero_once(int uffd, uint64_t start, const void *from,
                     uint64_t length, int64_t *done)
{
    struct uffdio_zeropage arg = { .range = { .start = start, .len = length } };
    int n = ioctl(uffd, UFFDIO_ZEROPAGE, &arg);

    (void)from;
    *done = arg.zeropage;
    return n;
}

static int continue_once(int uffd, uint64_t start, const void *from,
                         uint64_t length, int64_t *done)
{
    struct continue_arg arg = { .range = { .start = start, .len = length } };
    int n = ioctl(uffd, IOCTL_CONTINUE, &arg);

    (void)from;
    *done = arg.mapped;
    return n;
}

/*
 * EAGAIN with progress says only where something stopped the kernel; the next
 * call from there shows the reason. EEXIST: another loop placed the page
 * first; its waiters may have gone to sleep after that, so wake them.
 */
static struct result place_range(place_once *once, const char *what, int uffd,
                                 uint64_t start, const uint8_t *from,
                                 uint64_t length, uint64_t page_size)
{
    uint64_t at = 0;

    while (at < length) {
        int64_t done = 0;

        if (once(uffd, start + at, from ? from + at : NULL, length - at,
                 &done) == 0) {
            return result_ok();
        }
        if (errno == EAGAIN || errno == EINTR) {
            at += done > 0 ? (uint64_t)done : 0;
        } else if (errno == EEXIST) {
            uffd_wake(uffd, start + at, page_size);
            at += page_size;
        } else {
            bool gone = errno == ESRCH || errno == ENOENT;
            struct result r =
                result_errno(gone ? RESULT_GUEST : RESULT_HOST, what, errno);

            r.offset = at;
            return r;
        }
    }
    return result_ok();
}

struct result uffd_copy(int uffd, uint64_t to, const void *from,
                        uint64_t length, uint64_t page_size)
{
    return place_range(copy_once, "UFFDIO_COPY", uffd, to, from, length,
                       page_size);
}

struct result uffd_zero(int uffd, uint64_t start, uint64_t length,
                        uint64_t page_size)
{
    return place_range(zero_once, "UFFDIO_ZEROPAGE", uffd, start, NULL, length,
                       page_size);
}

struct result uffd_continue(int uffd, uint64_t start, uint64_t length,
                            uint64_t page_size)
{
    return place_range(continue_once, "UFFDIO_CONTINUE", uffd, start, NULL,
                       length, page_size);
}

#define EVENTS 32

struct result uffd_read(int uffd, struct uffd_fault *faults, uint32_t room,
                        uint32_t *count)
{
    struct uffd_msg messages[EVENTS];
    uint32_t most = room < EVENTS ? room : EVENTS;
    ssize_t n = read(uffd, messages, most * sizeof(messages[0]));

    *count = 0;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return result_ok();
    }
    if (n < 0) {
        return result_errno(RESULT_HOST, "reading the userfaultfd", errno);
    }
    for (size_t i = 0; i < (size_t)n / sizeof(messages[0]); i++) {
        const struct uffd_msg *m = &messages[i];

        /* No other event was asked for in uffd_negotiate(). */
        if (m->event == UFFD_EVENT_PAGEFAULT) {
            faults[(*count)++] = (struct uffd_fault){
                .address = m->arg.pagefault.address,
                .thread = m->arg.pagefault.feat.ptid,
            };
        }
    }
    return result_ok();
}
