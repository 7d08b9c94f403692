#include "placing.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static bool done(struct result r, struct fail *why)
{
    return RESULT_IS_OK(r) || fail(why, "%s: %s", r.what, strerror(r.err));
}

int place_open(struct fail *why)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        fail(why, "no userfaultfd: %s", strerror(errno));
    else if (place_negotiate(fd, why))
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

bool place_negotiate(int fd, struct fail *why)
{
    const uint32_t needed = UFFD_CAN_MISSING | UFFD_CAN_MINOR;
    uint32_t abilities;

    if (!done(uffd_negotiate(fd, &abilities), why))
        return false;
    return (abilities & needed) == needed ||
           fail(why, "this kernel has no minor faults");
}

bool place_watch(int fd, const void *start, uint64_t length, struct fail *why)
{
    return done(uffd_register(fd, (uintptr_t)start, length,
                              UFFD_MODE_MISSING | UFFD_MODE_MINOR),
                why);
}

bool place_unwatch(int fd, const void *start, uint64_t length, struct fail *why)
{
    return done(uffd_unregister(fd, (uintptr_t)start, length), why);
}

bool place_copy(int fd, const void *to, const void *from, uint64_t length,
                uint64_t page_size, struct fail *why)
{
    return done(uffd_copy(fd, (uintptr_t)to, from, length, page_size), why);
}

bool place_continue(int fd, const void *start, uint64_t length,
                    uint64_t page_size, struct fail *why)
{
    return done(uffd_continue(fd, (uintptr_t)start, length, page_size), why);
}
