/*
 * Guest physical addresses below 1 MiB:
 *
 *     0x6000   hvm_start_info and, behind it, the memory map
 *     0x7000   command line
 *
 * The kernel lies from 1 MiB on.
 */
#include "boot.h"
#include "guest/pvh.h"
#include "kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define START_ADDRESS 0x6000u
#define MEMORY_MAP_ADDRESS 0x6100u
#define COMMAND_LINE_ADDRESS 0x7000u
#define BASE_MEMORY 0xa0000u
#define KERNEL_LOWEST 0x100000u

static bool read_fully(int fd, uint8_t *bytes, size_t length)
{
    size_t done = 0;

    while (done < length) {
        ssize_t got = read(fd, bytes + done, length - done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        done += (size_t)got;
    }
    return true;
}

/* The whole file, to be freed; NULL with a reason. */
static uint8_t *read_file(const char *path, size_t *length, struct fail *why)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint8_t *bytes = NULL;
    struct stat status;

    if (fd < 0 || fstat(fd, &status) < 0) {
        fail(why, "cannot open %s: %s", path, strerror(errno));
    } else if (status.st_size < 1 || status.st_size > KERNEL_FILE_MAX) {
        fail(why, "%s has %lld bytes, a kernel has at most %u", path,
             (long long)status.st_size, KERNEL_FILE_MAX);
    } else {
        *length = (size_t)status.st_size;
        bytes = malloc(*length);
        if (bytes && !read_fully(fd, bytes, *length)) {
            fail(why, "cannot read %s", path);
            free(bytes);
            bytes = NULL;
        }
    }
    if (fd >= 0)
        close(fd);
    return bytes;
}

/* RAM is fresh and zero, so the rest of each segment is left alone. */
static void place_segments(const struct ram *ram, const struct kernel *kernel,
                           const uint8_t *file)
{
    for (size_t i = 0; i < kernel->count; i++) {
        const struct kernel_segment *s = &kernel->segments[i];

        memcpy(ram->base + s->address, file + s->offset, s->file_size);
    }
}

static bool place_kernel(const struct ram *ram, const char *path,
                         struct kernel *kernel, struct fail *why)
{
    struct fail reason;
    size_t length;
    uint8_t *file = read_file(path, &length, why);
    bool good;

    if (!file)
        return false;
    good = kernel_parse(file, length, KERNEL_LOWEST, ram_low(ram), kernel,
                        &reason);
    if (good)
        place_segments(ram, kernel, file);
    else
        fail(why, "cannot boot %s: %s", path, reason.text);
    free(file);
    return good;
}

static uint32_t make_memory_map(const struct ram *ram, struct pvh_memory map[3])
{
    uint64_t low = ram_low(ram);

    map[0] = (struct pvh_memory){ 0, BASE_MEMORY, PVH_MEMORY_RAM, 0 };
    map[1] = (struct pvh_memory){ KERNEL_LOWEST, low - KERNEL_LOWEST,
                                  PVH_MEMORY_RAM, 0 };
    map[2] =
        (struct pvh_memory){ RAM_HIGH, ram->length - low, PVH_MEMORY_RAM, 0 };
    return ram->length > low ? 3 : 2;
}

static void place_start_info(const struct ram *ram, const char *command_line)
{
    struct pvh_memory map[3];
    struct pvh_start_info info = {
        .magic = PVH_START_MAGIC,
        .version = 1,
        .command_line = COMMAND_LINE_ADDRESS,
        .memory_map = MEMORY_MAP_ADDRESS,
        .memory_map_entries = make_memory_map(ram, map),
    };

    memcpy(ram->base + START_ADDRESS, &info, sizeof(info));
    memcpy(ram->base + MEMORY_MAP_ADDRESS, map, sizeof(map));
    memcpy(ram->base + COMMAND_LINE_ADDRESS, command_line,
           strlen(command_line) + 1);
}

bool boot_kernel(struct vm *vm, const struct ram *ram, const char *path,
                 const char *command_line, struct fail *why)
{
    struct kernel kernel;

    if (strlen(command_line) >= COMMAND_LINE_MAX)
        return fail(why, "the command line is longer than %u bytes",
                    COMMAND_LINE_MAX - 1);
    if (!place_kernel(ram, path, &kernel, why))
        return false;
    place_start_info(ram, command_line);
    return vcpu_start_at(&vm->vcpus[0], kernel.entry, START_ADDRESS, why);
}
