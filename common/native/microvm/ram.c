#include "ram.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Kernel headers of long-term distributions may lack these. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define NEW_USERFAULTFD _IO(0xAA, 0x00)

static bool no_huge_pages(const struct ram *ram, struct fail *why)
{
    return fail(why,
                "the pool of 2 MiB pages is too small for %llu bytes of "
                "RAM: set vm.nr_hugepages to %llu more than are in use",
                (unsigned long long)ram->length,
                (unsigned long long)(ram->length / RAM_HUGE_PAGE));
}

static bool open_memfd(struct ram *ram, struct fail *why)
{
    bool huge = ram->page_size == RAM_HUGE_PAGE;
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING |
                     (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0);

    ram->memfd = memfd_create("guest-ram", flags);
    if (ram->memfd < 0)
        return fail(why, "cannot create a memfd%s: %s",
                    huge ? " of 2 MiB pages" : "", strerror(errno));
    if (ftruncate(ram->memfd, (off_t)ram->length) < 0)
        return fail(why, "cannot give the memfd %llu bytes: %s",
                    (unsigned long long)ram->length, strerror(errno));
    if (fcntl(ram->memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
        return fail(why, "cannot seal the memfd: %s", strerror(errno));
    return true;
}

/* A free range of `length` bytes that starts at a multiple of 2 MiB. */
static uint8_t *reserve_aligned(uint64_t length)
{
    uint8_t *start = mmap(NULL, length + RAM_HUGE_PAGE, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    size_t head;

    if (start == MAP_FAILED)
        return NULL;
    head = -(uintptr_t)start % RAM_HUGE_PAGE;
    if (head > 0)
        munmap(start, head);
    if (head < RAM_HUGE_PAGE)
        munmap(start + head + length, RAM_HUGE_PAGE - head);
    return start + head;
}

/*
 * No MAP_NORESERVE: huge pages are taken from the pool's account here, and a
 * pool too small is an error now instead of a SIGBUS in the running guest.
 */
static bool map_memfd(struct ram *ram, struct fail *why)
{
    void *place = reserve_aligned(ram->length);

    if (!place)
        return fail(why, "no address range for %llu bytes of RAM: %s",
                    (unsigned long long)ram->length, strerror(errno));
    ram->base = mmap(place, ram->length, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_FIXED, ram->memfd, 0);
    if (ram->base == MAP_FAILED && ram->page_size == RAM_HUGE_PAGE &&
        errno == ENOMEM)
        return no_huge_pages(ram, why);
    if (ram->base == MAP_FAILED)
        return fail(why, "cannot map the RAM: %s", strerror(errno));
    /* A child that touches a missing page would fill it with zeroes. */
    if (madvise(ram->base, ram->length, MADV_DONTFORK) < 0 ||
        madvise(ram->base, ram->length, MADV_DONTDUMP) < 0)
        return fail(why, "cannot advise on the RAM: %s", strerror(errno));
    return true;
}

/* The device first: its right is a file mode, not a capability. */
static int new_userfaultfd(bool for_kernel)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = -1;

    if (device >= 0) {
        fd = ioctl(device, NEW_USERFAULTFD, flags);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd < 0 && errno == EPERM && !for_kernel)
        fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
    return fd;
}

static void open_userfaultfd(struct ram *ram, bool for_kernel)
{
    ram->userfaultfd = new_userfaultfd(for_kernel);
    if (ram->userfaultfd >= 0)
        return;
    if (errno == EPERM)
        fail(&ram->no_userfaultfd,
             "userfaultfd is not permitted: let this "
             "user open /dev/userfaultfd or set vm.unprivileged_userfaultfd=1");
    else
        fail(&ram->no_userfaultfd, "this kernel has no userfaultfd: %s",
             strerror(errno));
}

static bool open_pagemap(struct ram *ram, struct fail *why)
{
    ram->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (ram->pagemap < 0)
        return fail(why, "cannot open /proc/self/pagemap: %s", strerror(errno));
    return true;
}

bool ram_create(struct ram *ram, uint64_t length, uint64_t page_size,
                bool for_kernel, struct fail *why)
{
    *ram = (struct ram){ .length = length, .page_size = page_size };
    open_userfaultfd(ram, for_kernel);
    return open_memfd(ram, why) && map_memfd(ram, why) &&
           open_pagemap(ram, why);
}

uint64_t ram_low(const struct ram *ram)
{
    return ram->length < RAM_LOW_MAX ? ram->length : RAM_LOW_MAX;
}
