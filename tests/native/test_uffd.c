#include "uffd.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 16

static const struct block_spec specs[] = {
    { .idstr = "ram", .length = PAGES * PAGE, .page_size = PAGE },
};

static uint32_t abilities;

struct fixture {
    struct guest guest;
    int uffd;
    uint64_t base;
    int file;
};

static void fixture_open(struct fixture *f, uint32_t modes)
{
    guest_open(&f->guest, specs, 1);
    f->uffd = open_ready_uffd();
    f->base = f->guest.ram.blocks[0].base;
    f->file = f->guest.ram.blocks[0].fd;
    NEED(RESULT_IS_OK(uffd_register(f->uffd, f->base, PAGES * PAGE, modes)));
}

static void fixture_close(struct fixture *f)
{
    close(f->uffd);
    guest_close(&f->guest);
}

/* A thread of the guest that looks at one page. */
struct look {
    const uint8_t *at;
    uint8_t got[PAGE];
    uint32_t thread;
};

static struct result look_at(void *arg)
{
    struct look *l = arg;

    __atomic_store_n(&l->thread, thread_id(), __ATOMIC_SEQ_CST);
    memcpy(l->got, l->at, PAGE);
    return result_ok();
}

static void read_fault(int uffd, struct uffd_fault *fault)
{
    uint32_t count = 0;

    while (!count) {
        struct pollfd p = { .fd = uffd, .events = POLLIN };

        NEED(poll(&p, 1, -1) == 1);
        NEED(RESULT_IS_OK(uffd_read(uffd, fault, 1, &count)));
    }
}

static void test_negotiate(void)
{
    int uffd = open_uffd();
    struct result r;

    CHECK(RESULT_IS_OK(uffd_negotiate(uffd, &abilities)));
    CHECK(abilities & UFFD_CAN_MISSING);
    r = uffd_negotiate(uffd, &abilities);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EINVAL);
    close(uffd);
    CHECK_EQ(uffd_negotiate(-1, &abilities).err, EBADF);
}

static void test_not_ours(void)
{
    int uffd = open_ready_uffd();
    struct uffd_fault fault;
    uint32_t count = 1;

    CHECK_EQ(uffd_register(uffd, 4096, PAGE, UFFD_MODE_MISSING).kind,
             RESULT_HOST);
    CHECK_EQ(uffd_register(uffd, 1, 1, UFFD_MODE_MISSING).err, EINVAL);
    CHECK_EQ(uffd_unregister(uffd, 1, 1).err, EINVAL);
    CHECK_EQ(uffd_wake(uffd, 1, 1).err, EINVAL);
    /* Nothing to read is no error. */
    CHECK(RESULT_IS_OK(uffd_read(uffd, &fault, 1, &count)));
    CHECK_EQ(count, 0);
    CHECK_EQ(uffd_read(-1, &fault, 1, &count).err, EBADF);
    close(uffd);
}

static void test_event(void)
{
    struct fixture f;
    struct look look = { 0 };
    struct job job;
    struct uffd_fault fault;
    uint8_t page[PAGE];

    fixture_open(&f, UFFD_MODE_MISSING);
    look.at = f.guest.memory[0] + 3 * PAGE;
    job_start(&job, look_at, &look);
    read_fault(f.uffd, &fault);
    CHECK_EQ(fault.address, f.base + 3 * PAGE);
    CHECK_EQ(fault.thread, __atomic_load_n(&look.thread, __ATOMIC_SEQ_CST));
    pattern_fill(page, 1);
    CHECK(RESULT_IS_OK(uffd_copy(f.uffd, fault.address, page, PAGE, PAGE)));
    job_wait(&job);
    CHECK(pattern_is(look.got, 1));
    fixture_close(&f);
}

/* Pages that are there are skipped, the others are placed. */
static void test_copy_into_gaps(void)
{
    struct fixture f;
    uint8_t *pages = malloc(PAGES * PAGE);
    uint8_t *at;

    fixture_open(&f, UFFD_MODE_MISSING);
    at = f.guest.memory[0];
    for (uint64_t i = 0; i < PAGES; i++) {
        pattern_fill(pages + i * PAGE, i);
    }
    for (uint64_t i = 0; i < PAGES; i += 3) {
        CHECK(RESULT_IS_OK(uffd_zero(f.uffd, f.base + i * PAGE, PAGE, PAGE)));
    }
    CHECK(RESULT_IS_OK(uffd_copy(f.uffd, f.base, pages, PAGES * PAGE, PAGE)));
    for (uint64_t i = 0; i < PAGES; i++) {
        CHECK(i % 3 ? pattern_is(at + i * PAGE, i) :
                      is_all_zero(at + i * PAGE));
    }
    /* And the same again changes nothing. */
    CHECK(RESULT_IS_OK(uffd_zero(f.uffd, f.base, PAGES * PAGE, PAGE)));
    CHECK(pattern_is(at + PAGE, 1));
    free(pages);
    fixture_close(&f);
}

/* EEXIST: who went to sleep after the page was placed is woken. */
static void test_placing_twice_wakes(void)
{
    struct fixture f;
    struct look look = { 0 };
    struct job job;
    struct uffd_fault fault;
    uint8_t page[PAGE];

    if (!(abilities & UFFD_CAN_MINOR)) {
        return;
    }
    fixture_open(&f, UFFD_MODE_MISSING | UFFD_MODE_MINOR);
    look.at = f.guest.memory[0];
    job_start(&job, look_at, &look);
    read_fault(f.uffd, &fault);
    /* Behind its back; now CONTINUE maps and wakes, COPY only wakes. */
    pattern_fill(page, 5);
    CHECK_EQ(pwrite(f.file, page, PAGE, 0), PAGE);
    CHECK(RESULT_IS_OK(uffd_copy(f.uffd, f.base, page, PAGE, PAGE)));
    /* Woken, it faults again, minor now. */
    read_fault(f.uffd, &fault);
    CHECK_EQ(fault.address, f.base);
    CHECK(RESULT_IS_OK(uffd_continue(f.uffd, f.base, PAGE, PAGE)));
    CHECK(RESULT_IS_OK(uffd_continue(f.uffd, f.base, PAGE, PAGE)));
    job_wait(&job);
    CHECK(pattern_is(look.got, 5));
    fixture_close(&f);
}

static void test_continue(void)
{
    struct fixture f;
    struct result r;
    uint8_t page[PAGE];
    uint8_t *at;

    if (!(abilities & UFFD_CAN_MINOR)) {
        return;
    }
    fixture_open(&f, UFFD_MODE_MISSING | UFFD_MODE_MINOR);
    at = f.guest.memory[0];
    for (uint64_t i = 0; i < 6; i++) {
        pattern_fill(page, i);
        CHECK_EQ(pwrite(f.file, page, PAGE, (off_t)(i * PAGE)), PAGE);
    }
    CHECK(RESULT_IS_OK(uffd_continue(f.uffd, f.base + PAGE, PAGE, PAGE)));
    CHECK(RESULT_IS_OK(uffd_continue(f.uffd, f.base + 3 * PAGE, PAGE, PAGE)));
    at[PAGE] ^= 0xff; /* the guest runs on */
    r = uffd_continue(f.uffd, f.base, PAGES * PAGE, PAGE);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EFAULT);
    CHECK_EQ(r.offset, 6 * PAGE);
    at[PAGE] ^= 0xff;
    for (uint64_t i = 0; i < 6; i++) {
        CHECK(pattern_is(at + i * PAGE, i));
    }
    fixture_close(&f);
}

static void test_unregistered_is_an_error(void)
{
    struct fixture f;
    uint8_t page[PAGE] = { 1 };

    fixture_open(&f, UFFD_MODE_MISSING);
    CHECK(RESULT_IS_OK(uffd_unregister(f.uffd, f.base, PAGES * PAGE)));
    CHECK(!RESULT_IS_OK(uffd_copy(f.uffd, f.base, page, PAGE, PAGE)));
    CHECK(is_all_zero(f.guest.memory[0])); /* no fault any more */
    fixture_close(&f);
}

static void test_wake_repeats_the_event(void)
{
    struct fixture f;
    struct look look = { 0 };
    struct job job;
    struct uffd_fault fault;

    fixture_open(&f, UFFD_MODE_MISSING);
    look.at = f.guest.memory[0];
    job_start(&job, look_at, &look);
    read_fault(f.uffd, &fault);
    CHECK(RESULT_IS_OK(uffd_wake(f.uffd, f.base, PAGES * PAGE)));
    read_fault(f.uffd, &fault);
    CHECK_EQ(fault.address, f.base);
    CHECK(RESULT_IS_OK(uffd_zero(f.uffd, f.base, PAGE, PAGE)));
    job_wait(&job);
    CHECK(is_all_zero(look.got));
    fixture_close(&f);
}

/* The descriptor of another process works on that one's memory. */
static void test_other_process(void)
{
    struct stranger s;
    uint8_t page[PAGE];
    uint8_t got[PAGE];
    uint32_t can;

    if (!stranger_open(&s, PAGES * PAGE)) {
        return;
    }
    CHECK(RESULT_IS_OK(uffd_negotiate(s.uffd, &can)));
    CHECK(RESULT_IS_OK(
        uffd_register(s.uffd, s.base, s.length, UFFD_MODE_MISSING)));
    pattern_fill(page, 2);
    CHECK(RESULT_IS_OK(uffd_copy(s.uffd, s.base, page, PAGE, PAGE)));
    CHECK_EQ(pread(s.memory, got, PAGE, 0), PAGE);
    CHECK(pattern_is(got, 2));
    stranger_kill(&s);
    CHECK_EQ(uffd_copy(s.uffd, s.base + PAGE, page, PAGE, PAGE).kind,
             RESULT_GUEST);
    CHECK_EQ(uffd_zero(s.uffd, s.base + PAGE, PAGE, PAGE).kind, RESULT_GUEST);
    if (can & UFFD_CAN_MINOR) {
        CHECK_EQ(uffd_continue(s.uffd, s.base, PAGE, PAGE).kind, RESULT_GUEST);
    }
    stranger_close(&s);
}

static void test_huge(void)
{
    static const struct block_spec huge[] = {
        { .idstr = "huge", .length = 2 * HUGE, .page_size = HUGE },
    };
    struct guest g;
    uint64_t base;
    int uffd;
    uint8_t *page;

    if (!have_huge_pages()) {
        fprintf(stderr, "no huge pages: not tested\n");
        return;
    }
    guest_open(&g, huge, 1);
    base = g.ram.blocks[0].base;
    uffd = open_ready_uffd();
    CHECK(RESULT_IS_OK(uffd_register(uffd, base, 2 * HUGE, UFFD_MODE_MISSING)));
    page = calloc(1, HUGE);
    pattern_fill(page + HUGE - PAGE, 3);
    CHECK(RESULT_IS_OK(uffd_copy(uffd, base + HUGE, page, HUGE, HUGE)));
    CHECK(RESULT_IS_OK(uffd_copy(uffd, base + HUGE, page, HUGE, HUGE)));
    CHECK(pattern_is(g.memory[0] + 2 * HUGE - PAGE, 3));
    free(page);
    close(uffd);
    guest_close(&g);
}

int main(void)
{
    int uffd = open_uffd();

    if (uffd < 0) {
        return check_skip("userfaultfd is not permitted");
    }
    close(uffd);
    RUN(test_negotiate);
    RUN(test_not_ours);
    RUN(test_event);
    RUN(test_copy_into_gaps);
    RUN(test_placing_twice_wakes);
    RUN(test_continue);
    RUN(test_unregistered_is_an_error);
    RUN(test_wake_repeats_the_event);
    RUN(test_other_process);
    RUN(test_huge);
    return check_status();
}
