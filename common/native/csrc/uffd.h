/*
 * userfaultfd: negotiate, register, read events, place and wake.
 *
 * The descriptor was made by the guest's process and works on that process's
 * addresses, whoever calls. Facts: userfaultfd(2), ioctl_userfaultfd(2); what
 * older header files lack is defined in uffd.c.
 */
#ifndef POSTCOPY_UFFD_H
#define POSTCOPY_UFFD_H

#include "error.h"

/* What a userfaultfd of this kernel can do, as far as we care. */
enum uffd_ability {
    UFFD_CAN_MISSING = 1,   /* missing pages of shmem and hugetlbfs */
    UFFD_CAN_THREAD_ID = 2, /* events name the faulting thread */
    UFFD_CAN_MINOR = 4,     /* receive in place, then continue */
    UFFD_CAN_WP_ASYNC = 8,  /* dirty tracking without events */
};

/*
 * The one UFFDIO_API call a userfaultfd gets, with as much as the kernel
 * offers. `*abilities` is a mask of enum uffd_ability. EINVAL means that the
 * descriptor was negotiated before, or is none.
 */
struct result uffd_negotiate(int uffd, uint32_t *abilities);

enum uffd_mode {
    UFFD_MODE_MISSING = 1,
    UFFD_MODE_WP = 2,
    UFFD_MODE_MINOR = 4,
};

struct result uffd_register(int uffd, uint64_t start, uint64_t length,
                            uint32_t modes);
struct result uffd_unregister(int uffd, uint64_t start, uint64_t length);
struct result uffd_protect(int uffd, uint64_t start, uint64_t length);
struct result uffd_wake(int uffd, uint64_t start, uint64_t length);

/*
 * Place pages. Each does the whole range: a page that is there already is
 * skipped and its waiters are woken. RESULT_GUEST: the guest's process is gone.
 */
struct result uffd_copy(int uffd, uint64_t to, const void *from,
                        uint64_t length, uint64_t page_size);
struct result uffd_zero(int uffd, uint64_t start, uint64_t length,
                        uint64_t page_size);
/* Every page of the range must be in the page cache. */
struct result uffd_continue(int uffd, uint64_t start, uint64_t length,
                            uint64_t page_size);

struct uffd_fault {
    uint64_t address;
    uint32_t thread;
};

/* Read faults without waiting; *count is how many, 0 if there are none. */
struct result uffd_read(int uffd, struct uffd_fault *faults, uint32_t room,
                        uint32_t *count);

#endif
