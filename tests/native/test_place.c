#include "place.h"

#include "check.h"
#include "support.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 64

static const struct block_spec small_specs[] = {
    { .idstr = "ram", .length = PAGES * PAGE, .page_size = PAGE },
    { .idstr = "vga", .length = 3 * PAGE, .page_size = PAGE },
};
static const struct block_spec huge_specs[] = {
    { .idstr = "ram", .length = 3 * HUGE, .page_size = HUGE },
};

static uint32_t abilities;

struct fixture {
    struct guest guest;
    struct destination d;
    int uffd;
};

static void fixture_open(struct fixture *f, const struct block_spec *specs,
                         uint32_t count, int way)
{
    guest_open(&f->guest, specs, count);
    NEED(RESULT_IS_OK(ram_prepare_destination(&f->guest.ram, -1)));
    f->uffd = way == PLACE_FILE ? -1 : open_ready_uffd();
    NEED(RESULT_IS_OK(
        destination_open(&f->d, &f->guest.ram, way, f->uffd, NULL, 0)));
}

static void fixture_close(struct fixture *f)
{
    destination_close(&f->d);
    if (f->uffd >= 0) {
        close(f->uffd);
    }
    guest_close(&f->guest);
}

static struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

/* Pages with pattern `seed` + page, contiguous. */
static struct result early(struct fixture *f, uint32_t i, uint64_t page,
                           uint32_t count, uint64_t seed)
{
    struct iovec iov[PAGES];
    uint8_t *bytes = malloc(count * PAGE);
    struct result r;

    for (uint32_t k = 0; k < count; k++) {
        pattern_fill(bytes + k * PAGE, seed + page + k);
        iov[k] = (struct iovec){ bytes + k * PAGE, PAGE };
    }
    r = place_early(&f->d, block(f, i), page, iov, count);
    free(bytes);
    return r;
}

/* The same in postcopy; claims them. */
static struct result late(struct fixture *f, uint32_t i, uint64_t page,
                          uint32_t count, uint64_t seed)
{
    struct iovec iov[PAGES];
    uint8_t *bytes = malloc(count * PAGE);
    struct result r;

    for (uint32_t k = 0; k < count; k++) {
        NEED(place_claim(&f->d, block(f, i), page + k));
        pattern_fill(bytes + k * PAGE, seed + page + k);
        iov[k] = (struct iovec){ bytes + k * PAGE, PAGE };
    }
    r = place_pages(&f->d, block(f, i), page, iov, count);
    free(bytes);
    return r;
}

static uint8_t *at(struct fixture *f, uint32_t i, uint64_t page)
{
    return f->guest.memory[i] + page * PAGE;
}

static uint64_t received(struct fixture *f, uint32_t i)
{
    return bitmap_count(&block(f, i)->received);
}

/* --- before postcopy ----------------------------------------------------- */

static void precopy(int way)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, way);
    CHECK(RESULT_IS_OK(early(&f, 0, 10, 5, 100)));
    CHECK(RESULT_IS_OK(early(&f, 0, 12, 1, 200)));
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), 14)));
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), 40)));
    CHECK(RESULT_IS_OK(early(&f, 1, 0, 3, 300)));
    CHECK_EQ(received(&f, 0), 6);
    CHECK_EQ(received(&f, 1), 3);
    CHECK(pattern_is(at(&f, 0, 10), 110));
    CHECK(pattern_is(at(&f, 0, 12), 212));
    CHECK(pattern_is(at(&f, 0, 13), 113));
    CHECK(pattern_is(at(&f, 1, 2), 302));
    /* A page that held data is cleared, a hole stays one. */
    CHECK_EQ(guest_allocated(&f.guest, 0), 5 * PAGE);
    CHECK(is_all_zero(at(&f, 0, 14)));

    CHECK(RESULT_IS_OK(destination_empty(&f.d)));
    CHECK_EQ(received(&f, 0) + received(&f, 1), 0);
    CHECK_EQ(guest_allocated(&f.guest, 0), 0);
    CHECK_EQ(guest_allocated(&f.guest, 1), 0);
    CHECK_EQ(bitmap_count(&block(&f, 0)->populated), 0);
    fixture_close(&f);
}

static void test_precopy(void)
{
    precopy(PLACE_FILE);
    precopy(PLACE_COPY);
    precopy(PLACE_CONTINUE);
}

static void test_precopy_huge(void)
{
    struct fixture f;
    struct ram_block *b;

    fixture_open(&f, huge_specs, 1, PLACE_CONTINUE);
    b = block(&f, 0);
    /* Zero pages of a huge page that holds nothing touch nothing. */
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, b, 0)));
    CHECK_EQ(guest_allocated(&f.guest, 0), 0);
    CHECK(RESULT_IS_OK(early(&f, 0, 510, 4, 7))); /* into two huge pages */
    CHECK_EQ(bitmap_count(&b->populated), 2);
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, b, 511)));
    CHECK(pattern_is(at(&f, 0, 510), 517));
    CHECK(is_all_zero(at(&f, 0, 511)));
    CHECK(pattern_is(at(&f, 0, 513), 520));
    CHECK_EQ(received(&f, 0), 5);
    fixture_close(&f);
}

static void test_no_more_room_in_the_file(void)
{
    struct fixture f;
    struct result r;

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    /* Somebody took the file away under us. */
    NEED(ftruncate(block(&f, 1)->fd, 0) == 0);
    NEED(fcntl(block(&f, 1)->fd, F_ADD_SEALS, F_SEAL_GROW) == 0);
    r = early(&f, 1, 1, 1, 0);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EPERM);
    CHECK_EQ(r.offset, PAGE);
    CHECK_EQ(received(&f, 1), 0);
    fixture_close(&f);
}

/* --- the switch ---------------------------------------------------------- */

static void discard(int way)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, way);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, PAGES, 0)));
    CHECK(RESULT_IS_OK(destination_discard(&f.d, 0, 3 * PAGE, 2 * PAGE)));
    CHECK(RESULT_IS_OK(destination_discard(&f.d, 0, 63 * PAGE, PAGE)));
    CHECK_EQ(received(&f, 0), PAGES - 3);
    CHECK(!bitmap_test(&block(&f, 0)->received, 3));
    CHECK(!bitmap_test(&block(&f, 0)->received, 4));
    CHECK(bitmap_test(&block(&f, 0)->received, 5));
    CHECK_EQ(guest_allocated(&f.guest, 0),
             (PAGES - (way == PLACE_CONTINUE ? 0u : 3u)) * PAGE);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 3 + 3);
    CHECK(!is_readable(f.d.complete_fd));
    CHECK(!place_claim(&f.d, block(&f, 0), 5));
    CHECK_EQ(f.d.stats.duplicate_pages, 1);
    CHECK(place_claim(&f.d, block(&f, 0), 3));
    CHECK(!place_claim(&f.d, block(&f, 0), 3));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_discard(void)
{
    discard(PLACE_FILE);
    discard(PLACE_COPY);
    discard(PLACE_CONTINUE);
}

/* A huge page that came in part is missing as a whole. */
static void test_listen_settles_huge_pages(void)
{
    struct fixture f;

    fixture_open(&f, huge_specs, 1, PLACE_CONTINUE);
    for (uint64_t p = 0; p < 512 + 511; p++) {
        CHECK(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), p)));
    }
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 2);
    CHECK_EQ(received(&f, 0), 512);
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_nothing_missing(void)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, PAGES, 0)));
    CHECK(RESULT_IS_OK(early(&f, 1, 0, 3, 0)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 0);
    CHECK(is_readable(f.d.complete_fd));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_probe(void)
{
    struct fixture f;
    int other;

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(destination_probe(&f.d)));
    CHECK(is_all_zero(at(&f, 0, 0))); /* no fault: it is as it was */
    /* Somebody else watches the memory. */
    other = open_ready_uffd();
    CHECK(RESULT_IS_OK(
        uffd_register(other, block(&f, 1)->base, 3 * PAGE, UFFD_MODE_MISSING)));
    CHECK_EQ(destination_probe(&f.d).err, EBUSY);
    CHECK_EQ(destination_listen(&f.d).kind, RESULT_HOST);
    close(other);
    fixture_close(&f);
    fixture_open(&f, small_specs, 2, PLACE_FILE);
    CHECK(RESULT_IS_OK(destination_probe(&f.d)));
    fixture_close(&f);
}

/* --- postcopy ------------------------------------------------------------ */

/* What was placed is there without a fault; nobody answers faults here. */
static void postcopy(int way)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, way);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, 4, 0)));
    CHECK(RESULT_IS_OK(destination_discard(&f.d, 0, 2 * PAGE, 2 * PAGE)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), PAGES - 2 + 3);
    CHECK(RESULT_IS_OK(late(&f, 0, 2, 1, 1000)));
    CHECK(RESULT_IS_OK(late(&f, 0, 4, 40, 1000)));
    CHECK(RESULT_IS_OK(late(&f, 1, 0, 3, 2000)));
    CHECK(pattern_is(at(&f, 0, 2), 1002));
    CHECK(pattern_is(at(&f, 0, 4), 1004));
    CHECK(pattern_is(at(&f, 0, 43), 1043));
    CHECK(pattern_is(at(&f, 1, 2), 2002));
    CHECK_EQ(destination_missing(&f.d), PAGES - 43);
    /* A stale page and holes that turn out to be zero. */
    for (uint64_t p = 3; p < PAGES; p += p == 3 ? 41 : 1) {
        CHECK(place_claim(&f.d, block(&f, 0), p));
        CHECK(!is_readable(f.d.complete_fd));
        CHECK(RESULT_IS_OK(place_zero(&f.d, block(&f, 0), p)));
    }
    CHECK_EQ(destination_missing(&f.d), 0);
    CHECK(is_readable(f.d.complete_fd));
    CHECK_EQ(received(&f, 0), PAGES);
    if (way != PLACE_FILE) {
        CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 3)));
        CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 63)));
        CHECK(is_all_zero(at(&f, 0, 63)));
        CHECK(is_all_zero(at(&f, 0, 3)));
    }
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    CHECK(is_all_zero(at(&f, 0, 3)));
    CHECK(is_all_zero(at(&f, 0, 50)));
    CHECK(pattern_is(at(&f, 0, 1), 1));
    fixture_close(&f);
}

static void test_postcopy(void)
{
    postcopy(PLACE_FILE);
    postcopy(PLACE_COPY);
    postcopy(PLACE_CONTINUE);
}

/* Somebody is known to wait: a zero page is placed at once, not left a hole. */
static void zero_for_waiter(int way)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, way);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    bitmap_test_and_set(&block(&f, 0)->requested, 9);
    CHECK(place_claim(&f.d, block(&f, 0), 9));
    CHECK(RESULT_IS_OK(place_zero(&f.d, block(&f, 0), 9)));
    CHECK(is_all_zero(at(&f, 0, 9)));
    CHECK(place_claim(&f.d, block(&f, 0), 10));
    CHECK(RESULT_IS_OK(place_zero(&f.d, block(&f, 0), 10)));
    CHECK_EQ(guest_allocated(&f.guest, 0), PAGE);
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_zero_for_waiter(void)
{
    zero_for_waiter(PLACE_COPY);
    zero_for_waiter(PLACE_CONTINUE);
}

/* What the guest wrote is kept, whoever resolves the page again. */
static void resolve_keeps_writes(int way)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, way);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK(RESULT_IS_OK(late(&f, 0, 5, 3, 0)));
    pattern_fill(at(&f, 0, 6), 77);
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 6)));
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 6)));
    CHECK(RESULT_IS_OK(place_sweep(&f.d, f.d.complete_fd)));
    CHECK(pattern_is(at(&f, 0, 5), 5));
    CHECK(pattern_is(at(&f, 0, 6), 77));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_resolve_keeps_writes(void)
{
    resolve_keeps_writes(PLACE_COPY);
    resolve_keeps_writes(PLACE_CONTINUE);
}

/* One fault maps what is here around it. */
static void test_resolve_maps_neighbours(void)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, 40, 0)));
    CHECK(RESULT_IS_OK(destination_discard(&f.d, 0, 20 * PAGE, PAGE)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 17)));
    CHECK_EQ(bitmap_count(&block(&f, 0)->mapped), 15);
    for (uint64_t p = 16; p < 32; p++) {
        CHECK(p == 20 || pattern_is(at(&f, 0, p), p));
    }
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_sweep(void)
{
    struct fixture f;
    int stop = make_event();

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, 40, 0)));
    CHECK(RESULT_IS_OK(early(&f, 1, 0, 3, 0)));
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), 50)));
    CHECK(RESULT_IS_OK(destination_discard(&f.d, 0, 20 * PAGE, PAGE)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK(RESULT_IS_OK(place_sweep(&f.d, stop)));
    CHECK_EQ(bitmap_count(&block(&f, 0)->mapped), 39);
    CHECK_EQ(bitmap_count(&block(&f, 1)->mapped), 3);
    CHECK(!bitmap_test(&block(&f, 0)->mapped, 20));
    for (uint64_t p = 0; p < 40; p++) {
        CHECK(p == 20 || pattern_is(at(&f, 0, p), p));
    }
    /* Nothing is left to do, and a second one does it. */
    CHECK(RESULT_IS_OK(place_sweep(&f.d, stop)));
    set_event(stop);
    CHECK_EQ(place_sweep(&f.d, stop).kind, RESULT_STOPPED);
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
    close(stop);
}

/* The guest may give back pages (a balloon) before it ever touched them. */
static void given_back(struct fixture *f, uint64_t page)
{
    NEED(fallocate(block(f, 0)->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                   (off_t)(page * PAGE), PAGE) == 0);
}

static void test_sweep_over_given_back_pages(void)
{
    struct fixture f;
    int stop = make_event();

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, 40, 0)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    given_back(&f, 0);
    given_back(&f, 10);
    given_back(&f, 11);
    given_back(&f, 39);
    CHECK(RESULT_IS_OK(place_sweep(&f.d, stop)));
    CHECK_EQ(bitmap_count(&block(&f, 0)->mapped), 36);
    CHECK(pattern_is(at(&f, 0, 9), 9));
    CHECK(pattern_is(at(&f, 0, 12), 12));
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 11)));
    CHECK(is_all_zero(at(&f, 0, 11)));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
    close(stop);
}

/* The last page arrives while the sweep and the fault loop still work. */
static void test_finish_under_the_sweep(void)
{
    struct fixture f;
    int stop = make_event();

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, 40, 0)));
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), 50)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    CHECK(RESULT_IS_OK(place_sweep(&f.d, stop)));
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 3)));
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 50)));
    CHECK(pattern_is(at(&f, 0, 3), 3));
    CHECK(is_all_zero(at(&f, 0, 50)));
    fixture_close(&f);
    close(stop);
}

static void test_resolve_beside_given_back_pages(void)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(early(&f, 0, 0, 16, 0)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    given_back(&f, 5);
    CHECK(RESULT_IS_OK(place_resolve(&f.d, block(&f, 0), 3)));
    CHECK(pattern_is(at(&f, 0, 3), 3));
    CHECK(pattern_is(at(&f, 0, 15), 15));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

/* --- a new connection ---------------------------------------------------- */

/* What a lost connection had claimed and not placed can be claimed again. */
static void new_epoch(int way, const struct block_spec *specs, uint32_t count)
{
    struct fixture f;
    struct ram_block *b;
    uint64_t missing;

    fixture_open(&f, specs, count, way);
    b = block(&f, 0);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    missing = destination_missing(&f.d);
    CHECK(place_claim(&f.d, b, 0));
    CHECK(RESULT_IS_OK(place_zero(&f.d, b, 0)));
    CHECK(place_claim(&f.d, b, 1));
    CHECK(RESULT_IS_OK(destination_begin_epoch(&f.d)));
    CHECK_EQ(destination_missing(&f.d), missing - 1);
    CHECK(!is_readable(f.d.complete_fd));
    CHECK(!place_claim(&f.d, b, 0));
    CHECK(place_claim(&f.d, b, 1));
    CHECK(RESULT_IS_OK(place_zero(&f.d, b, 1)));
    CHECK_EQ(destination_missing(&f.d), missing - 2);
    CHECK(!place_claim(&f.d, b, 1));
    CHECK(way == PLACE_FILE || RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
}

static void test_new_epoch(void)
{
    new_epoch(PLACE_FILE, small_specs, 2);
    new_epoch(PLACE_COPY, small_specs, 2);
    new_epoch(PLACE_CONTINUE, small_specs, 2);
}

static void test_new_epoch_huge(void)
{
    new_epoch(PLACE_COPY, huge_specs, 1);
    new_epoch(PLACE_CONTINUE, huge_specs, 1);
}

/* The connection was lost when all had come, and nobody had noticed yet. */
static void test_new_epoch_with_nothing_missing(void)
{
    struct fixture f;

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    for (uint32_t i = 0; i < 2; i++) {
        bitmap_set_range(&block(&f, i)->received, 0, block_pages(block(&f, i)));
    }
    CHECK(!is_readable(f.d.complete_fd));
    CHECK(RESULT_IS_OK(destination_begin_epoch(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 0);
    CHECK(is_readable(f.d.complete_fd));
    fixture_close(&f);
}

/* --- huge pages in postcopy ---------------------------------------------- */

static void postcopy_huge(int way)
{
    struct fixture f;
    struct ram_block *b;
    uint8_t *scratch = calloc(1, HUGE);
    uint8_t *to;

    fixture_open(&f, huge_specs, 1, way);
    b = block(&f, 0);
    CHECK(RESULT_IS_OK(early(&f, 0, 512, 1, 0))); /* soon stale */
    CHECK(RESULT_IS_OK(destination_discard(&f.d, 0, HUGE, HUGE)));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 3);

    CHECK(place_claim(&f.d, b, 0));
    to = place_huge_at(&f.d, b, 0, scratch);
    CHECK((to == scratch) == (way == PLACE_COPY));
    pattern_fill(to + 7 * PAGE, 1);
    CHECK(RESULT_IS_OK(place_huge(&f.d, b, 0, to)));
    CHECK(pattern_is(at(&f, 0, 7), 1));
    CHECK(is_all_zero(at(&f, 0, 8)));

    /* A stale page and one that never held anything become zero. */
    for (uint64_t host = 1; host < 3; host++) {
        CHECK(place_claim(&f.d, b, host));
        CHECK(RESULT_IS_OK(place_zero(&f.d, b, host)));
        CHECK(RESULT_IS_OK(place_resolve(&f.d, b, host)));
        CHECK(RESULT_IS_OK(place_resolve(&f.d, b, host)));
        CHECK(is_all_zero(at(&f, 0, 512 * host)));
    }
    CHECK(!place_claim(&f.d, b, 2));
    CHECK_EQ(f.d.stats.duplicate_pages, 512);
    CHECK(is_readable(f.d.complete_fd));
    CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    fixture_close(&f);
    free(scratch);
}

static void test_postcopy_huge(void)
{
    postcopy_huge(PLACE_COPY);
    postcopy_huge(PLACE_CONTINUE);
}

int main(void)
{
    int uffd = open_uffd();

    RUN(test_no_more_room_in_the_file);
    if (uffd < 0) {
        return check_skip("userfaultfd is not permitted");
    }
    NEED(RESULT_IS_OK(uffd_negotiate(uffd, &abilities)));
    close(uffd);
    if (!(abilities & UFFD_CAN_MINOR)) {
        return check_skip("no minor faults of shared memory (Linux 5.14)");
    }
    RUN(test_precopy);
    RUN(test_discard);
    RUN(test_nothing_missing);
    RUN(test_probe);
    RUN(test_postcopy);
    RUN(test_zero_for_waiter);
    RUN(test_resolve_keeps_writes);
    RUN(test_resolve_maps_neighbours);
    RUN(test_sweep);
    RUN(test_sweep_over_given_back_pages);
    RUN(test_finish_under_the_sweep);
    RUN(test_resolve_beside_given_back_pages);
    RUN(test_new_epoch);
    RUN(test_new_epoch_with_nothing_missing);
    if (have_huge_pages()) {
        RUN(test_precopy_huge);
        RUN(test_listen_settles_huge_pages);
        RUN(test_postcopy_huge);
        RUN(test_new_epoch_huge);
    } else {
        fprintf(stderr, "no huge pages: not tested\n");
    }
    return check_status();
}
