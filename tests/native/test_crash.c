/*
 * A daemon that is killed anywhere between the steps of placing a page: the one
 * after it finds bitmaps it can go on with, and no page that the guest may have
 * written to is placed again.
 */
#include "check.h"
#include "place.h"
#include "support.h"
#include "uffd.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 256
#define SEED 1000
#define MARK_AT (PAGE - 8)

static struct stranger guest;
static int kept;

/* --- a daemon --------------------------------------------------------------
 */

struct daemon {
    struct ram ram;
    struct destination d;
};

static struct ram_block *block(struct daemon *self)
{
    return &self->ram.blocks[0];
}

static void daemon_open(struct daemon *self)
{
    NEED(RESULT_IS_OK(ram_open(&self->ram, 1)));
    NEED(RESULT_IS_OK(ram_add(&self->ram, "ram", guest.length, PAGE, guest.base,
                              guest.memory)));
    NEED(RESULT_IS_OK(ram_prepare_destination(&self->ram, kept)));
    NEED(RESULT_IS_OK(destination_open(&self->d, &self->ram, PLACE_CONTINUE,
                                       guest.uffd, NULL, 0)));
    NEED(RESULT_IS_OK(destination_listen(&self->d)));
}

static void daemon_close(struct daemon *self)
{
    destination_close(&self->d);
    ram_close(&self->ram);
}

/* Every fourth page is one of zeroes. */
static bool has_data(uint64_t page)
{
    return page % 4 != 0;
}

static struct result place(struct daemon *self, uint64_t page)
{
    uint8_t bytes[PAGE];
    struct iovec iov = { bytes, PAGE };

    if (!place_claim(&self->d, block(self), page)) {
        return result_ok();
    }
    if (!has_data(page)) {
        return place_zero(&self->d, block(self), page);
    }
    pattern_fill(bytes, SEED + page);
    return place_pages(&self->d, block(self), page, &iov, 1);
}

static void die(int number)
{
    (void)number;
    kill(getpid(), SIGKILL);
}

static void expect_killed(pid_t pid)
{
    int status;

    NEED(waitpid(pid, &status, 0) == pid);
    NEED(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* --- the guest -------------------------------------------------------------
 */

static void world_open(void)
{
    struct ram ram;
    uint32_t abilities;

    NEED(stranger_open(&guest, PAGES * PAGE));
    NEED(RESULT_IS_OK(uffd_negotiate(guest.uffd, &abilities)));
    NEED(RESULT_IS_OK(ram_open(&ram, 1)));
    NEED(RESULT_IS_OK(
        ram_add(&ram, "ram", guest.length, PAGE, guest.base, guest.memory)));
    kept = memfd_create("kept", MFD_CLOEXEC);
    NEED(kept >= 0 && ftruncate(kept, (off_t)ram_kept_length(&ram)) == 0);
    ram_close(&ram);
}

static void world_close(void)
{
    stranger_kill(&guest);
    stranger_close(&guest);
    close(kept);
}

/* Whether the guest can write to it without a fault. */
static bool is_mapped(uint64_t page)
{
    uint64_t entry;
    uint64_t at = (guest.base / PAGE + page) * sizeof(entry);

    NEED(pread(guest.pagemap, &entry, sizeof(entry), (off_t)at) ==
         sizeof(entry));
    return entry >> 63;
}

static uint64_t word_at(uint64_t page, uint64_t offset)
{
    uint64_t word;

    NEED(pread(guest.memory, &word, sizeof(word),
               (off_t)(page * PAGE + offset)) == sizeof(word));
    return word;
}

/* What only the guest writes: the last word of a page that it can reach. */
static void guest_writes(uint64_t page)
{
    uint64_t mark = ~page;
    struct iovec from = { &mark, sizeof(mark) };
    struct iovec to = { (void *)(uintptr_t)(guest.base + page * PAGE + MARK_AT),
                        sizeof(mark) };

    NEED(process_vm_writev(guest.pid, &from, 1, &to, 1, 0) == sizeof(mark));
}

static bool content_is_right(uint64_t page, bool marked)
{
    uint8_t wanted[PAGE] = { 0 };
    uint8_t found[PAGE];
    uint64_t mark = ~page;

    if (has_data(page)) {
        pattern_fill(wanted, SEED + page);
    }
    if (marked) {
        memcpy(wanted + MARK_AT, &mark, sizeof(mark));
    }
    NEED(pread(guest.memory, found, PAGE, (off_t)(page * PAGE)) == PAGE);
    return memcmp(wanted, found, PAGE) == 0;
}

/* --- death at a step -------------------------------------------------------
 */

enum step { POPULATED, WRITTEN, RECEIVED, MAPPED };

static void forbid(uint64_t *words)
{
    NEED(mprotect(words, BITMAP_ALIGN, PROT_READ) == 0);
}

/* Calls on it fail from now on. */
static void spoil(int fd)
{
    NEED(dup2(open("/dev/null", O_RDONLY), fd) == fd);
}

/* Places a page, and dies at the first store or call of that step. */
static void daemon_until(enum step step, uint64_t page)
{
    struct daemon self;

    signal(SIGSEGV, die);
    daemon_open(&self);
    switch (step) {
    case POPULATED:
        forbid(block(&self)->populated.words);
        break;
    case WRITTEN:
        spoil(guest.memory);
        break;
    case RECEIVED:
        forbid(block(&self)->received.words);
        break;
    case MAPPED:
        spoil(guest.uffd);
        break;
    }
    if (!RESULT_IS_OK(place(&self, page))) {
        die(0);
    }
    _exit(0);
}

static void dies_at(enum step step, uint64_t page, bool received)
{
    struct daemon next;
    pid_t pid;

    world_open();
    pid = fork();
    NEED(pid >= 0);
    if (pid == 0) {
        daemon_until(step, page);
    }
    expect_killed(pid);
    CHECK(!is_mapped(page));
    daemon_open(&next);
    CHECK_EQ(place_is_here(block(&next), page), received);
    CHECK_EQ(destination_missing(&next.d), PAGES - (received ? 1 : 0));
    CHECK(RESULT_IS_OK(place(&next, page)));
    CHECK(RESULT_IS_OK(place_resolve(&next.d, block(&next), page)));
    CHECK(is_mapped(page));
    CHECK(content_is_right(page, false));
    daemon_close(&next);
    world_close();
}

static void test_dies_before_the_page(void)
{
    dies_at(POPULATED, 5, false);
    dies_at(WRITTEN, 5, false);
}

static void test_dies_between_page_and_mark(void)
{
    dies_at(RECEIVED, 5, false);
    dies_at(RECEIVED, 4, false);
}

static void test_dies_between_mark_and_mapping(void)
{
    dies_at(MAPPED, 5, true);
}

/* --- death at any moment ----------------------------------------------- */

struct shared {
    uint64_t done; /* pages that this daemon is done with; atomic */
};

/* Not all of them, or a slow killer would find that all is done. */
static void daemon_places(struct shared *shared, uint64_t random,
                          uint64_t at_most)
{
    uint64_t first = next_random(&random) % PAGES;
    struct daemon self;

    daemon_open(&self);
    for (uint64_t i = 0; i < PAGES && i < at_most; i++) {
        NEED(RESULT_IS_OK(place(&self, (first + 37 * i) % PAGES)));
        __atomic_add_fetch(&shared->done, 1, __ATOMIC_SEQ_CST);
    }
    for (;;) {
        pause();
    }
}

/* Returns how many pages it has placed at least. */
static void daemon_lives_a_moment(struct shared *shared, uint64_t *random)
{
    uint64_t enough = next_random(random) % (PAGES / 8);
    pid_t pid;

    shared->done = 0;
    pid = fork();
    NEED(pid >= 0);
    if (pid == 0) {
        daemon_places(shared, *random, enough + PAGES / 8);
    }
    while (__atomic_load_n(&shared->done, __ATOMIC_SEQ_CST) < enough) {
    }
    for (uint64_t spin = next_random(random) % 20000; spin > 0; spin--) {
        __asm__ volatile("");
    }
    NEED(kill(pid, SIGKILL) == 0);
    expect_killed(pid);
}

static void test_dies_at_any_moment(void)
{
    struct shared *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
                                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t random = 7;
    uint64_t deaths = 0;

    NEED(shared != MAP_FAILED);
    for (unsigned round = 0; round < 10; round++) {
        bool marked[PAGES] = { false };
        uint64_t missing = PAGES;

        world_open();
        while (missing > 0) {
            struct daemon next;

            daemon_lives_a_moment(shared, &random);
            deaths++;
            daemon_open(&next);
            missing = destination_missing(&next.d);
            for (uint64_t page = 0; page < PAGES; page++) {
                if (is_mapped(page)) {
                    CHECK(place_is_here(block(&next), page));
                    guest_writes(page);
                    marked[page] = true;
                }
            }
            daemon_close(&next);
        }
        for (uint64_t page = 0; page < PAGES; page++) {
            CHECK(content_is_right(page, marked[page]));
            CHECK_EQ(word_at(page, MARK_AT) == ~page, marked[page]);
        }
        world_close();
    }
    CHECK(deaths > 20);
    munmap(shared, sizeof(*shared));
}

int main(void)
{
    RUN(test_dies_before_the_page);
    RUN(test_dies_between_page_and_mark);
    RUN(test_dies_between_mark_and_mapping);
    RUN(test_dies_at_any_moment);
    return check_status();
}
