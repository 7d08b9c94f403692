#include "ram.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct result ram_open(struct ram *ram, uint32_t capacity)
{
    *ram = (struct ram){ 0 };
    if (capacity == 0 || capacity > RAM_BLOCKS_MAX) {
        return result_errno(RESULT_HOST, "number of RAM blocks", EINVAL);
    }
    ram->blocks = calloc(capacity, sizeof(*ram->blocks));
    if (!ram->blocks) {
        return result_errno(RESULT_HOST, "table of RAM blocks", ENOMEM);
    }
    ram->capacity = capacity;
    return result_ok();
}

void ram_close(struct ram *ram)
{
    for (uint32_t i = 0; i < ram->count; i++) {
        struct ram_block *b = &ram->blocks[i];

        if (b->map) {
            munmap(b->map, b->map_length);
        }
        bitmap_close(&b->dirty);
        bitmap_close(&b->owed);
        bitmap_close(&b->solid);
        bitmap_close(&b->received);
        bitmap_close(&b->discarded);
        bitmap_close(&b->requested);
        bitmap_close(&b->claimed);
        bitmap_close(&b->populated);
        bitmap_close(&b->mapped);
        bitmap_close(&b->expected);
        bitmap_close(&b->prepared);
    }
    free(ram->blocks);
    *ram = (struct ram){ 0 };
}

static struct result check_geometry(const char *idstr, uint64_t length,
                                    uint64_t page_size, int fd)
{
    size_t name = strlen(idstr);
    struct stat st;

    if (name == 0 || name > IDSTR_MAX) {
        return result_errno(RESULT_HOST, "RAM block name", EINVAL);
    }
    if (page_size < TARGET_PAGE_SIZE || page_size > HOST_PAGE_MAX ||
        (page_size & (page_size - 1))) {
        return result_errno(RESULT_HOST, "RAM block page size", EINVAL);
    }
    if (length == 0 || length % page_size || length > INT64_MAX) {
        return result_errno(RESULT_HOST, "RAM block length", EINVAL);
    }
    if (fstat(fd, &st) < 0) {
        return result_errno(RESULT_HOST, "fstat of a RAM block", errno);
    }
    /* A mapping past the end of its file is a SIGBUS waiting to happen. */
    if ((uint64_t)st.st_size < length) {
        return result_errno(RESULT_HOST, "RAM block file is too short", EINVAL);
    }
    return result_ok();
}

struct result ram_add(struct ram *ram, const char *idstr, uint64_t length,
                      uint64_t page_size, uint64_t base, int fd)
{
    struct result r = check_geometry(idstr, length, page_size, fd);
    struct ram_block *b;

    if (!RESULT_IS_OK(r)) {
        return r;
    }
    if (ram->count == ram->capacity) {
        return result_errno(RESULT_HOST, "too many RAM blocks", ENOSPC);
    }
    if (ram_find(ram, idstr, strlen(idstr))) {
        return result_errno(RESULT_HOST, "RAM block named twice", EEXIST);
    }
    b = &ram->blocks[ram->count++];
    b->idstr_length = (uint8_t)strlen(idstr);
    memcpy(b->idstr, idstr, b->idstr_length);
    b->length = length;
    b->page_size = page_size;
    b->host_bits = (unsigned)__builtin_ctzll(page_size);
    b->base = base;
    b->fd = fd;
    ram->total += length;
    return result_ok();
}

struct result ram_start_at(struct ram *ram, uint64_t start)
{
    struct ram_block *b = &ram->blocks[ram->count - 1];
    struct stat st;

    if (start % TARGET_PAGE_SIZE || start > INT64_MAX - b->length) {
        return result_errno(RESULT_HOST, "start of a RAM block in its file",
                            EINVAL);
    }
    if (fstat(b->fd, &st) < 0) {
        return result_errno(RESULT_HOST, "fstat of a RAM block", errno);
    }
    if ((uint64_t)st.st_size < start + b->length) {
        return result_errno(RESULT_HOST, "RAM block file is too short", EINVAL);
    }
    b->start = start;
    return result_ok();
}

/* Aligned, so that huge pages of the file can be huge in the mapping. */
static struct result map_block(struct ram_block *b, int protection)
{
    size_t length = (size_t)b->length;
    uint8_t *room = mmap(NULL, length + CHUNK_SIZE, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *map;
    size_t before;

    if (room == MAP_FAILED) {
        return result_errno(RESULT_HOST, "address space for a RAM block",
                            errno);
    }
    before = -(uintptr_t)room & (CHUNK_SIZE - 1);
    map = mmap(room + before, length, protection, MAP_SHARED | MAP_FIXED, b->fd,
               (off_t)b->start);
    if (map == MAP_FAILED) {
        int err = errno;

        munmap(room, length + CHUNK_SIZE);
        return result_errno(RESULT_HOST, "mmap of a RAM block", err);
    }
    if (before) {
        munmap(room, before);
    }
    munmap(map + length, CHUNK_SIZE - before);
    b->map = map;
    b->map_length = length;
    return result_ok();
}

struct result ram_prepare_source(struct ram *ram)
{
    for (uint32_t i = 0; i < ram->count; i++) {
        struct ram_block *b = &ram->blocks[i];
        struct result r = map_block(b, PROT_READ);

        if (RESULT_IS_OK(r)) {
            r = bitmap_open(&b->dirty, block_pages(b));
        }
        if (RESULT_IS_OK(r)) {
            r = bitmap_open(&b->owed, block_hosts(b));
        }
        if (RESULT_IS_OK(r)) {
            r = bitmap_open(&b->solid, block_chunks(b));
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

uint64_t ram_kept_length(const struct ram *ram)
{
    uint64_t length = 0;

    for (uint32_t i = 0; i < ram->count; i++) {
        length += bitmap_length(block_pages(&ram->blocks[i])) +
                  bitmap_length(block_hosts(&ram->blocks[i]));
    }
    return length;
}

static struct result open_kept(struct ram_block *b, int kept_fd,
                               uint64_t *offset)
{
    struct result r =
        bitmap_open_file(&b->received, block_pages(b), kept_fd, *offset);

    *offset += bitmap_length(block_pages(b));
    if (RESULT_IS_OK(r)) {
        r = bitmap_open_file(&b->populated, block_hosts(b), kept_fd, *offset);
    }
    *offset += bitmap_length(block_hosts(b));
    return r;
}

static struct result open_own(struct ram_block *b)
{
    struct result r = bitmap_open(&b->received, block_pages(b));

    return RESULT_IS_OK(r) ? bitmap_open(&b->populated, block_hosts(b)) : r;
}

static struct result prepare_destination(struct ram_block *b)
{
    struct result r = map_block(b, PROT_READ | PROT_WRITE);

    if (RESULT_IS_OK(r)) {
        r = bitmap_open(&b->discarded, block_pages(b));
    }
    if (RESULT_IS_OK(r)) {
        r = bitmap_open(&b->requested, block_hosts(b));
    }
    if (RESULT_IS_OK(r)) {
        r = bitmap_open(&b->claimed, block_hosts(b));
    }
    if (RESULT_IS_OK(r)) {
        r = bitmap_open(&b->mapped, block_hosts(b));
    }
    if (RESULT_IS_OK(r)) {
        r = bitmap_open(&b->expected, block_chunks(b));
    }
    if (RESULT_IS_OK(r)) {
        r = bitmap_open(&b->prepared, block_chunks(b));
    }
    return r;
}

struct result ram_prepare_destination(struct ram *ram, int kept_fd)
{
    uint64_t offset = 0;

    for (uint32_t i = 0; i < ram->count; i++) {
        struct ram_block *b = &ram->blocks[i];
        struct result r = prepare_destination(b);

        if (RESULT_IS_OK(r)) {
            r = kept_fd < 0 ? open_own(b) : open_kept(b, kept_fd, &offset);
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

struct ram_block *ram_find(struct ram *ram, const void *name, size_t length)
{
    for (uint32_t i = 0; i < ram->count; i++) {
        struct ram_block *b = &ram->blocks[i];

        if (b->idstr_length == length && !memcmp(b->idstr, name, length)) {
            return b;
        }
    }
    return NULL;
}

struct ram_block *ram_at(struct ram *ram, uint64_t address)
{
    for (uint32_t i = 0; i < ram->count; i++) {
        struct ram_block *b = &ram->blocks[i];

        if (b->base && address >= b->base && address - b->base < b->length) {
            return b;
        }
    }
    return NULL;
}

uint64_t ram_largest_page(const struct ram *ram)
{
    uint64_t size = TARGET_PAGE_SIZE;

    for (uint32_t i = 0; i < ram->count; i++) {
        if (ram->blocks[i].page_size > size) {
            size = ram->blocks[i].page_size;
        }
    }
    return size;
}

static bool is_cut_off(const struct ram_block *b)
{
    struct stat file;

    return fstat(b->fd, &file) < 0 ||
           (uint64_t)file.st_size < b->start + b->length;
}

uint64_t ram_next_data(const struct ram_block *b, uint64_t offset)
{
    off_t data = lseek(b->fd, (off_t)(b->start + offset), SEEK_DATA);

    if (data < 0) {
        return errno == ENXIO && !is_cut_off(b) ? b->length : offset;
    }
    offset = (uint64_t)data - b->start;
    return offset < b->length ? offset : b->length;
}

struct result ram_read(const struct ram_block *b, uint64_t offset, void *to,
                       uint64_t length)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pread(b->fd, (uint8_t *)to + done, length - done,
                          (off_t)(b->start + offset + done));

        if (n > 0) {
            done += (uint64_t)n;
        } else if (n == 0 || errno != EINTR) {
            struct result r =
                n ? result_errno(RESULT_HOST, "read of stored RAM", errno) :
                    result_of(RESULT_HOST, "stored RAM is cut off");

            r.offset = offset + done;
            return r;
        }
    }
    return result_ok();
}
