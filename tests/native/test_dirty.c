#include "dirty.h"

#include "check.h"
#include "support.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static const struct block_spec specs[] = {
    { .idstr = "ram", .length = 8 * MIB, .page_size = PAGE },
    { .idstr = "vga", .length = 64 * PAGE, .page_size = PAGE },
};
static const struct block_spec huge_specs[] = {
    { .idstr = "ram", .length = 4 * HUGE, .page_size = HUGE },
    { .idstr = "vga", .length = 64 * PAGE, .page_size = PAGE },
};

struct fixture {
    struct guest guest;
    struct dirty dirty;
    uint64_t pages; /* of all blocks */
};

static void fixture_open(struct fixture *f, const struct block_spec *blocks,
                         int way)
{
    guest_open(&f->guest, blocks, 2);
    NEED(RESULT_IS_OK(ram_prepare_source(&f->guest.ram)));
    f->dirty = (struct dirty){ .ram = &f->guest.ram, .way = way };
    f->dirty.uffd = open_ready_uffd();
    f->dirty.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    NEED(f->dirty.pagemap >= 0);
    f->pages = f->guest.ram.total / PAGE;
}

static void fixture_close(struct fixture *f)
{
    close(f->dirty.uffd);
    close(f->dirty.pagemap);
    guest_close(&f->guest);
}

static uint64_t dirty_count(struct fixture *f)
{
    return bitmap_count(&f->guest.ram.blocks[0].dirty) +
           bitmap_count(&f->guest.ram.blocks[1].dirty);
}

static void forget_dirty(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        struct bitmap *b = &f->guest.ram.blocks[i].dirty;

        bitmap_clear_range(b, 0, b->bits);
    }
}

static void test_nobody_writes(void)
{
    struct fixture f;
    uint64_t pages = 1;

    fixture_open(&f, specs, DIRTY_NEVER);
    CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
    CHECK_EQ(dirty_count(&f), f.pages);
    forget_dirty(&f);
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    CHECK_EQ(pages, 0);
    CHECK_EQ(dirty_count(&f), 0);
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

static void test_nobody_knows(void)
{
    struct fixture f;
    uint64_t pages = 0;

    fixture_open(&f, specs, DIRTY_UNKNOWN);
    CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
    forget_dirty(&f);
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    CHECK_EQ(pages, f.pages);
    CHECK_EQ(dirty_count(&f), f.pages);
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

static void test_written_pages_and_no_others(void)
{
    struct fixture f;
    uint64_t pages;

    fixture_open(&f, specs, DIRTY_WP_ASYNC);
    f.guest.memory[0][100 * PAGE] = 1; /* some memory is there before */
    CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
    CHECK_EQ(dirty_count(&f), f.pages);
    forget_dirty(&f);
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    CHECK_EQ(pages, 0);

    f.guest.memory[0][0] = 1; /* the first, a hole before */
    f.guest.memory[0][100 * PAGE] = 2;
    f.guest.memory[0][8 * MIB - 1] = 3; /* the last */
    f.guest.memory[1][63 * PAGE] = 4;
    CHECK_EQ(((volatile uint8_t *)f.guest.memory[0])[50 * PAGE], 0); /* read */
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    CHECK_EQ(pages, 4);
    CHECK_EQ(dirty_count(&f), 4);
    CHECK(bitmap_test(&f.guest.ram.blocks[0].dirty, 0));
    CHECK(bitmap_test(&f.guest.ram.blocks[0].dirty, 100));
    CHECK(bitmap_test(&f.guest.ram.blocks[0].dirty, 2047));
    CHECK(bitmap_test(&f.guest.ram.blocks[1].dirty, 63));

    /* The bits add up; each write is reported once. */
    f.guest.memory[0][7 * PAGE] = 1;
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    CHECK_EQ(pages, 1);
    CHECK_EQ(dirty_count(&f), 5);
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

/* More ranges than one call returns. */
static void test_scattered_writes(void)
{
    struct fixture f;
    uint64_t pages;

    fixture_open(&f, specs, DIRTY_WP_ASYNC);
    CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
    forget_dirty(&f);
    for (uint64_t p = 0; p < 2048; p += 2) {
        f.guest.memory[0][p * PAGE] = 1;
    }
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    CHECK_EQ(pages, 1024);
    for (uint64_t p = 0; p < 2048; p++) {
        CHECK_EQ(bitmap_test(&f.guest.ram.blocks[0].dirty, p), p % 2 == 0);
    }
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

/* --- a guest that writes all the time ------------------------------------ */

#define WRITERS 3

struct writer {
    struct fixture *f;
    uint64_t index;
    uint32_t *stop;
    uint64_t writes;
};

/* Each thread has its own word in every page. */
static struct result write_on(void *arg)
{
    struct writer *w = arg;
    uint64_t random = w->index;

    while (!__atomic_load_n(w->stop, __ATOMIC_SEQ_CST)) {
        uint32_t i = next_random(&random) % 8 == 0;
        uint64_t page =
            next_random(&random) % block_pages(&w->f->guest.ram.blocks[i]);
        uint64_t *words =
            (uint64_t *)(void *)(w->f->guest.memory[i] + page * PAGE);

        __atomic_fetch_add(&words[w->index * 100], 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&w->writes, 1, __ATOMIC_RELAXED);
    }
    return result_ok();
}

/* What the pump does: clear the bit, then copy the page. */
static void copy_dirty(struct fixture *f, uint8_t *const copies[2])
{
    for (uint32_t i = 0; i < 2; i++) {
        struct ram_block *b = &f->guest.ram.blocks[i];

        for (uint64_t p = 0;
             (p = bitmap_next_set(&b->dirty, p)) < b->dirty.bits;) {
            bitmap_test_and_clear(&b->dirty, p);
            memcpy(copies[i] + p * PAGE, b->map + p * PAGE, PAGE);
        }
    }
}

static void follow_writers(const struct block_spec *blocks)
{
    struct fixture f;
    struct job jobs[WRITERS];
    struct writer writers[WRITERS];
    uint32_t stop = 0;
    uint64_t pages;
    uint64_t followed = 0;
    uint8_t *copies[2];

    fixture_open(&f, blocks, DIRTY_WP_ASYNC);
    for (uint32_t i = 0; i < 2; i++) {
        copies[i] = malloc(blocks[i].length);
    }
    for (uint64_t i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){ &f, i, &stop, 0 };
        job_start(&jobs[i], write_on, &writers[i]);
    }
    CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
    for (int round = 0; round < 30; round++) {
        uint64_t before = __atomic_load_n(&writers[0].writes, __ATOMIC_RELAXED);

        copy_dirty(&f, copies);
        /*
         * Every pass has writes to find. The first that is counted may have
         * been made before the last pass.
         */
        while (__atomic_load_n(&writers[0].writes, __ATOMIC_RELAXED) <
               before + 2) {
        }
        CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
        CHECK(pages > 0);
        followed += pages;
    }
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    for (uint64_t i = 0; i < WRITERS; i++) {
        job_wait(&jobs[i]);
    }
    CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
    copy_dirty(&f, copies);
    CHECK(followed > 0);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_BYTES(copies[i], f.guest.memory[i], blocks[i].length);
        free(copies[i]);
    }
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

static void test_follow_writers(void)
{
    follow_writers(specs);
}

static void test_follow_writers_in_huge_pages(void)
{
    if (!have_huge_pages()) {
        fprintf(stderr, "no huge pages: not tested\n");
        return;
    }
    follow_writers(huge_specs);
}

/* --- what can go wrong --------------------------------------------------- */

/* Unwatched memory must not look unwritten. */
static void test_sync_without_start(void)
{
    struct fixture f;
    struct result r;
    uint64_t pages;

    fixture_open(&f, specs, DIRTY_WP_ASYNC);
    r = dirty_sync(&f.dirty, &pages);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EPERM);
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

static void test_start_again_after_stop(void)
{
    struct fixture f;
    uint64_t pages;

    fixture_open(&f, specs, DIRTY_WP_ASYNC);
    for (int round = 0; round < 2; round++) {
        CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
        CHECK_EQ(dirty_count(&f), f.pages);
        forget_dirty(&f);
        f.guest.memory[0][PAGE] = 1;
        CHECK(RESULT_IS_OK(dirty_sync(&f.dirty, &pages)));
        CHECK_EQ(pages, 1);
        CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
        f.guest.memory[0][PAGE] = 2; /* as fast as ever, nobody looks */
    }
    fixture_close(&f);
}

static void test_guest_is_gone(void)
{
    struct stranger s;
    struct ram ram;
    struct dirty d;
    uint32_t abilities;
    uint64_t pages;

    if (!stranger_open(&s, 16 * PAGE)) {
        return;
    }
    CHECK(RESULT_IS_OK(uffd_negotiate(s.uffd, &abilities)));
    CHECK(RESULT_IS_OK(ram_open(&ram, 1)));
    CHECK(RESULT_IS_OK(ram_add(&ram, "ram", s.length, PAGE, s.base, s.memory)));
    CHECK(RESULT_IS_OK(ram_prepare_source(&ram)));
    d = (struct dirty){
        .ram = &ram, .way = DIRTY_WP_ASYNC, .uffd = s.uffd, .pagemap = s.pagemap
    };
    CHECK(RESULT_IS_OK(dirty_start(&d)));
    CHECK(RESULT_IS_OK(dirty_sync(&d, &pages)));
    CHECK_EQ(pages, 0);
    stranger_kill(&s);
    CHECK_EQ(dirty_sync(&d, &pages).kind, RESULT_GUEST);
    CHECK(RESULT_IS_OK(dirty_stop(&d)));
    ram_close(&ram);
    stranger_close(&s);
}

/* Of what is clean nothing is missed, and what is dirty stays so. */
static void test_last_sync(void)
{
    struct fixture f;
    struct bitmap *dirty;
    uint64_t pages;

    fixture_open(&f, specs, DIRTY_WP_ASYNC);
    dirty = &f.guest.ram.blocks[0].dirty;
    CHECK(RESULT_IS_OK(dirty_start(&f.dirty)));
    forget_dirty(&f);
    bitmap_set_range(dirty, CHUNK_PAGES, CHUNK_PAGES);
    f.guest.memory[0][3 * PAGE] = 1;
    f.guest.memory[0][(CHUNK_PAGES + 3) * PAGE] = 1; /* where all is dirty */
    f.guest.memory[0][2 * CHUNK_PAGES * PAGE] = 1;
    f.guest.memory[0][8 * MIB - 1] = 1;
    f.guest.memory[1][63 * PAGE] = 1;
    CHECK(RESULT_IS_OK(dirty_sync_last(&f.dirty, &pages)));
    CHECK_EQ(pages, 4);
    CHECK_EQ(dirty_count(&f), CHUNK_PAGES + 4);
    CHECK(bitmap_test(dirty, 3));
    CHECK(bitmap_test(dirty, 2 * CHUNK_PAGES));
    CHECK(bitmap_test(dirty, 2047));
    CHECK(RESULT_IS_OK(dirty_stop(&f.dirty)));
    fixture_close(&f);
}

int main(void)
{
    uint32_t abilities = 0;
    int uffd = open_uffd();

    if (uffd < 0) {
        return check_skip("userfaultfd is not permitted");
    }
    NEED(RESULT_IS_OK(uffd_negotiate(uffd, &abilities)));
    close(uffd);
    RUN(test_nobody_writes);
    RUN(test_nobody_knows);
    if (!(abilities & UFFD_CAN_WP_ASYNC)) {
        return check_skip("no asynchronous write protection (Linux 6.7)");
    }
    RUN(test_written_pages_and_no_others);
    RUN(test_last_sync);
    RUN(test_scattered_writes);
    RUN(test_follow_writers);
    RUN(test_follow_writers_in_huge_pages);
    RUN(test_sync_without_start);
    RUN(test_start_again_after_stop);
    RUN(test_guest_is_gone);
    return check_status();
}
