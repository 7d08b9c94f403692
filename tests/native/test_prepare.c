#include "prepare.h"

#include "check.h"
#include "place.h"
#include "support.h"

#include <unistd.h>

#define CHUNKS 4

static const struct block_spec specs[] = {
    { .idstr = "ram", .length = 3 * HUGE + MIB, .page_size = PAGE },
};

struct fixture {
    struct guest guest;
    struct destination d;
    struct ram_block *block;
    int uffd;
    int stop_fd;
};

static void fixture_open(struct fixture *f, int32_t way)
{
    guest_open(&f->guest, specs, 1);
    NEED(RESULT_IS_OK(ram_prepare_destination(&f->guest.ram, -1)));
    f->uffd = way == PLACE_FILE ? -1 : open_ready_uffd();
    NEED(RESULT_IS_OK(
        destination_open(&f->d, &f->guest.ram, way, f->uffd, NULL, 0)));
    f->block = &f->guest.ram.blocks[0];
    f->stop_fd = make_event();
}

static void fixture_close(struct fixture *f)
{
    destination_close(&f->d);
    if (f->uffd >= 0) {
        close(f->uffd);
    }
    close(f->stop_fd);
    guest_close(&f->guest);
}

static struct result expect(struct fixture *f, const char *kinds)
{
    uint8_t bytes[CHUNKS + 1];
    uint64_t count = strlen(kinds);

    for (uint64_t i = 0; i < count; i++) {
        bytes[i] = (uint8_t)(kinds[i] - '0');
    }
    return prepare_expect_untrusted(&f->d, f->block, 0, bytes, count);
}

static struct result place(struct fixture *f, uint64_t page, uint64_t seed)
{
    static uint8_t data[PAGE];
    struct iovec iov = { .iov_base = data, .iov_len = PAGE };

    pattern_fill(data, seed);
    return place_early(&f->d, f->block, page, &iov, 1);
}

static void test_full_chunks_are_allocated(void)
{
    struct fixture f;

    fixture_open(&f, PLACE_FILE);
    CHECK(RESULT_IS_OK(expect(&f, "0121")));
    CHECK(RESULT_IS_OK(prepare_run(&f.d, f.stop_fd)));
    CHECK_EQ(bitmap_count(&f.block->prepared), 1);
    CHECK(bitmap_test(&f.block->prepared, 2));
    CHECK_EQ(guest_allocated(&f.guest, 0), HUGE);
    CHECK(prepared_at(f.block, 2 * CHUNK_PAGES));
    CHECK(!prepared_at(f.block, 2 * CHUNK_PAGES - 1));
    fixture_close(&f);
}

static void test_empty_chunks_are_here(void)
{
    struct fixture f;

    fixture_open(&f, PLACE_FILE);
    CHECK(RESULT_IS_OK(expect(&f, "1001")));
    CHECK_EQ(bitmap_count(&f.block->received), CHUNK_PAGES + CHUNK_PAGES / 2);
    CHECK_EQ(guest_allocated(&f.guest, 0), 0);
    fixture_close(&f);
}

static void test_pages_go_into_it(void)
{
    struct fixture f;

    fixture_open(&f, PLACE_FILE);
    CHECK(RESULT_IS_OK(expect(&f, "2")));
    CHECK(RESULT_IS_OK(prepare_run(&f.d, f.stop_fd)));
    CHECK(RESULT_IS_OK(place(&f, 3, 17)));
    CHECK(RESULT_IS_OK(place(&f, CHUNK_PAGES + 3, 18)));
    CHECK(pattern_is(f.guest.memory[0] + 3 * PAGE, 17));
    CHECK(pattern_is(f.guest.memory[0] + (CHUNK_PAGES + 3) * PAGE, 18));
    CHECK(is_all_zero(f.guest.memory[0] + 4 * PAGE));
    /* Sent again, as zero. */
    CHECK(RESULT_IS_OK(place_early_zero(&f.d, f.block, 3)));
    CHECK(is_all_zero(f.guest.memory[0] + 3 * PAGE));
    fixture_close(&f);
}

/* What came before the chunk's turn stays, and the chunk as it was. */
static void test_stream_was_faster(void)
{
    struct fixture f;

    fixture_open(&f, PLACE_FILE);
    CHECK(RESULT_IS_OK(expect(&f, "22")));
    CHECK(RESULT_IS_OK(place(&f, 0, 1)));
    CHECK(RESULT_IS_OK(place(&f, CHUNK_PAGES + 9, 2)));
    CHECK(RESULT_IS_OK(prepare_run(&f.d, f.stop_fd)));
    CHECK(!bitmap_test(&f.block->prepared, 0));
    CHECK(bitmap_test(&f.block->prepared, 1));
    CHECK(pattern_is(f.guest.memory[0], 1));
    CHECK(pattern_is(f.guest.memory[0] + (CHUNK_PAGES + 9) * PAGE, 2));
    CHECK_EQ(guest_allocated(&f.guest, 0), HUGE + PAGE);
    fixture_close(&f);
}

/* In postcopy what is prepared and has not come yet is a fault all the same. */
static void test_postcopy_into_it(void)
{
    static uint8_t data[PAGE];
    struct iovec iov = { .iov_base = data, .iov_len = PAGE };
    struct fixture f;
    struct destination *d = &f.d;

    fixture_open(&f, PLACE_CONTINUE);
    CHECK(RESULT_IS_OK(expect(&f, "2")));
    CHECK(RESULT_IS_OK(prepare_run(&f.d, f.stop_fd)));
    CHECK_EQ(bitmap_count(&f.block->prepared), 1);
    CHECK(RESULT_IS_OK(destination_listen(d)));
    CHECK_EQ(destination_missing(d), block_hosts(f.block));
    pattern_fill(data, 5);
    CHECK(place_claim(d, f.block, 7));
    CHECK(RESULT_IS_OK(place_pages(d, f.block, 7, &iov, 1)));
    CHECK(pattern_is(f.guest.memory[0] + 7 * PAGE, 5));
    CHECK(place_claim(d, f.block, 8));
    CHECK(RESULT_IS_OK(place_zero(d, f.block, 8)));
    CHECK(RESULT_IS_OK(place_resolve(d, f.block, 8)));
    CHECK(is_all_zero(f.guest.memory[0] + 8 * PAGE));
    CHECK(!bitmap_test(&f.block->mapped, 9));
    CHECK(RESULT_IS_OK(destination_finish(d)));
    fixture_close(&f);
}

static void test_refusals(void)
{
    struct fixture f;
    uint8_t kinds[2] = { CHUNK_FULL, CHUNK_FULL };

    fixture_open(&f, PLACE_FILE);
    CHECK_EQ(expect(&f, "003").kind, RESULT_STREAM);
    CHECK_EQ(prepare_expect_untrusted(&f.d, f.block, CHUNKS - 1, kinds, 2).kind,
             RESULT_STREAM);
    CHECK_EQ(prepare_expect_untrusted(&f.d, f.block, UINT64_MAX, kinds, 2).kind,
             RESULT_STREAM);
    f.d.listening = 1;
    CHECK_EQ(expect(&f, "0").kind, RESULT_STREAM);
    f.d.listening = 0;
    fixture_close(&f);
}

static void test_stop(void)
{
    struct fixture f;

    fixture_open(&f, PLACE_FILE);
    CHECK(RESULT_IS_OK(expect(&f, "222")));
    set_event(f.stop_fd);
    CHECK_EQ(prepare_run(&f.d, f.stop_fd).kind, RESULT_STOPPED);
    CHECK_EQ(guest_allocated(&f.guest, 0), 0);
    fixture_close(&f);
}

int main(void)
{
    int uffd = open_ready_uffd();

    RUN(test_full_chunks_are_allocated);
    RUN(test_empty_chunks_are_here);
    RUN(test_pages_go_into_it);
    RUN(test_stream_was_faster);
    if (uffd >= 0) {
        close(uffd);
        RUN(test_postcopy_into_it);
    }
    RUN(test_refusals);
    RUN(test_stop);
    return check_status();
}
