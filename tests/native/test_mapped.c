#include "mapped.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGES 700
#define START (3 * PAGE)

/* A file with the pages of a block from START on; page i of pattern i + 1. */
struct saved {
    struct mapped mapped;
    struct bitmap data;
    uint8_t *map;
    int copy;
};

static void saved_open(struct saved *s)
{
    int fd = memfd_create("saved", MFD_CLOEXEC);
    void *map;

    NEED(fd >= 0 && ftruncate(fd, START + (PAGES + 1) * PAGE) == 0);
    map =
        mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, START);
    NEED(map != MAP_FAILED);
    memset(s, 0, sizeof(*s));
    NEED(RESULT_IS_OK(bitmap_open(&s->data, PAGES)));
    s->mapped = (struct mapped){ .fd = fd, .start = START, .data = &s->data };
    s->map = map;
    s->copy = memfd_create("copy", MFD_CLOEXEC);
    NEED(s->copy >= 0 && ftruncate(s->copy, PAGES * PAGE) == 0);
}

static void saved_close(struct saved *s)
{
    munmap(s->map, PAGES * PAGE);
    bitmap_close(&s->data);
    close(s->mapped.fd);
    close(s->copy);
}

static void put_page_data(struct saved *s, uint64_t page)
{
    pattern_fill(s->map + page * PAGE, page + 1);
}

static uint64_t allocated(int fd)
{
    struct stat st;

    NEED(fstat(fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512 / PAGE;
}

static bool copy_is(const struct saved *s, uint64_t page, bool data)
{
    static _Alignas(4096) uint8_t bytes[PAGE];

    NEED(pread(s->copy, bytes, PAGE, (off_t)(page * PAGE)) == PAGE);
    return data ? pattern_is(bytes, page + 1) : is_all_zero(bytes);
}

/* What is data is there, what is not is a hole, whatever the file holds. */
static void test_copy(void)
{
    uint64_t seed = 9;

    for (unsigned density = 1; density < 40; density += 6) {
        struct saved s;

        saved_open(&s);
        for (uint64_t page = 0; page < PAGES; page++) {
            put_page_data(&s, page);
            if (next_random(&seed) % density == 0) {
                bitmap_test_and_set(&s.data, page);
            }
        }
        CHECK(RESULT_IS_OK(mapped_copy(&s.mapped, s.copy, -1)));
        for (uint64_t page = 0; page < PAGES; page++) {
            CHECK(copy_is(&s, page, bitmap_test(&s.data, page)));
        }
        CHECK_EQ(allocated(s.copy), bitmap_count(&s.data));
        saved_close(&s);
    }
}

static void test_copy_where_the_kernel_refuses(void)
{
    struct saved s;
    int flags;

    saved_open(&s);
    put_page_data(&s, 5);
    bitmap_test_and_set(&s.data, 5);
    /*
     * copy_file_range(2) refuses a file that was opened to append. pwrite(2)
     * appends to it whatever it is told, which is the right place here.
     */
    NEED(ftruncate(s.copy, 5 * PAGE) == 0);
    flags = fcntl(s.copy, F_GETFL);
    NEED(fcntl(s.copy, F_SETFL, flags | O_APPEND) == 0);
    CHECK(RESULT_IS_OK(mapped_copy(&s.mapped, s.copy, -1)));
    CHECK(copy_is(&s, 5, true));
    saved_close(&s);
}

static void test_nothing_is_stale(void)
{
    struct saved s;
    uint64_t pages = 77;

    saved_open(&s);
    for (uint64_t page = 0; page < PAGES; page += 3) {
        put_page_data(&s, page);
        bitmap_test_and_set(&s.data, page);
    }
    /* Zeroes that take room are zeroes. */
    memset(s.map + 4 * PAGE, 0, PAGE);
    CHECK(RESULT_IS_OK(mapped_stale(&s.mapped, false, &pages, -1)));
    CHECK_EQ(pages, 0);
    saved_close(&s);
}

static void test_stale_pages_become_holes(void)
{
    struct saved s;
    uint64_t pages = 0, before;
    uint64_t stale = 0;

    saved_open(&s);
    for (uint64_t page = 0; page < PAGES; page++) {
        if (page % 5 != 4) {
            put_page_data(&s, page);
        }
        if (page % 3 == 0) {
            bitmap_test_and_set(&s.data, page);
            put_page_data(&s, page);
        } else if (page % 5 != 4) {
            stale++;
        }
    }
    /* One byte, the last of a page, is enough. */
    s.map[(4 + 1) * PAGE - 1] = 1;
    stale++;
    before = allocated(s.mapped.fd);
    CHECK(RESULT_IS_OK(mapped_stale(&s.mapped, false, &pages, -1)));
    CHECK_EQ(pages, stale);
    CHECK_EQ(allocated(s.mapped.fd), before);
    CHECK(RESULT_IS_OK(mapped_stale(&s.mapped, true, &pages, -1)));
    CHECK_EQ(pages, stale);
    CHECK_EQ(allocated(s.mapped.fd), before - stale);
    for (uint64_t page = 0; page < PAGES; page++) {
        if (page % 3 == 0) {
            CHECK(pattern_is(s.map + page * PAGE, page + 1));
        }
    }
    CHECK(RESULT_IS_OK(mapped_stale(&s.mapped, true, &pages, -1)));
    CHECK_EQ(pages, 0);
    saved_close(&s);
}

/* What is around the block's pages is not its. */
static void test_neighbours(void)
{
    static _Alignas(4096) uint8_t bytes[PAGE];
    struct saved s;
    uint64_t pages = 0;

    saved_open(&s);
    pattern_fill(bytes, 1);
    NEED(pwrite(s.mapped.fd, bytes, PAGE, START - PAGE) == PAGE);
    NEED(pwrite(s.mapped.fd, bytes, PAGE, START + PAGES * PAGE) == PAGE);
    CHECK(RESULT_IS_OK(mapped_stale(&s.mapped, true, &pages, -1)));
    CHECK_EQ(pages, 0);
    CHECK_EQ(allocated(s.mapped.fd), 2);
    CHECK(RESULT_IS_OK(mapped_copy(&s.mapped, s.copy, -1)));
    CHECK_EQ(allocated(s.copy), 0);
    saved_close(&s);
}

static void test_read_only(void)
{
    char path[32];
    struct saved s;
    uint64_t pages = 0;
    struct result r;
    int fd;

    saved_open(&s);
    put_page_data(&s, 3);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", s.mapped.fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    NEED(fd >= 0);
    close(s.mapped.fd);
    s.mapped.fd = fd;
    r = mapped_stale(&s.mapped, true, &pages, -1);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EBADF);
    CHECK_EQ(r.offset, 3 * PAGE);
    saved_close(&s);
}

static void test_cut_off(void)
{
    struct saved s;
    struct result r;

    saved_open(&s);
    bitmap_set_range(&s.data, 0, PAGES);
    NEED(ftruncate(s.mapped.fd, START + 10 * PAGE) == 0);
    r = mapped_copy(&s.mapped, s.copy, -1);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_TEXT(r.what, "mapped-ram file is cut off");
    saved_close(&s);
}

static void test_stop(void)
{
    int stop = make_event();
    struct saved s;
    uint64_t pages;

    saved_open(&s);
    bitmap_set_range(&s.data, 0, PAGES / 2);
    set_event(stop);
    CHECK_EQ(mapped_copy(&s.mapped, s.copy, stop).kind, RESULT_STOPPED);
    CHECK_EQ(mapped_stale(&s.mapped, false, &pages, stop).kind, RESULT_STOPPED);
    close(stop);
    saved_close(&s);
}

int main(void)
{
    RUN(test_copy);
    RUN(test_copy_where_the_kernel_refuses);
    RUN(test_nothing_is_stale);
    RUN(test_stale_pages_become_holes);
    RUN(test_neighbours);
    RUN(test_read_only);
    RUN(test_cut_off);
    RUN(test_stop);
    return check_status();
}
