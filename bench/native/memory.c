#include "memory.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int memory_file(uint64_t length, struct fail *why)
{
    int fd = memfd_create("bench", MFD_CLOEXEC);

    if (fd >= 0 && ftruncate(fd, (off_t)length) == 0)
        return fd;
    fail(why, "cannot make a memfd of %llu bytes: %s",
         (unsigned long long)length, strerror(errno));
    if (fd >= 0)
        close(fd);
    return -1;
}

uint8_t *memory_map(int fd, uint64_t length, struct fail *why)
{
    uint8_t *range = mmap(NULL, length + HUGE_PAGE, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *place, *map = MAP_FAILED;

    if (range != MAP_FAILED) {
        place = range + -(uintptr_t)range % HUGE_PAGE;
        map = mmap(place, length, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED, fd, 0);
    }
    if (map != MAP_FAILED)
        return map;
    fail(why, "cannot map %llu bytes: %s", (unsigned long long)length,
         strerror(errno));
    return NULL;
}

/* As huge pages: what is split later is warm as well, not so what is merged. */
bool memory_warm_up(uint64_t length, struct fail *why)
{
    uint8_t *map = mmap(NULL, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (map == MAP_FAILED)
        return fail(why, "no memory for %llu bytes: %s",
                    (unsigned long long)length, strerror(errno));
    madvise(map, length, MADV_HUGEPAGE);
    for (uint64_t at = 0; at < length; at += SMALL_PAGE)
        map[at] = 1;
    munmap(map, length);
    return true;
}

/* Anonymous pages and pages of files, without those of memfds. */
uint64_t memory_own(pid_t pid)
{
    unsigned long long anonymous = 0, of_files = 0;
    char path[32], line[128];
    FILE *status;

    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    status = fopen(path, "re");
    while (status && fgets(line, sizeof(line), status)) {
        sscanf(line, "RssAnon: %llu", &anonymous);
        sscanf(line, "RssFile: %llu", &of_files);
    }
    if (status)
        fclose(status);
    return (anonymous + of_files) << 10;
}
