#include "bitmap.h"

#include "check.h"
#include "support.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void test_sizes(void)
{
    static const uint64_t sizes[] = { 0, 1, 63, 64, 65, 4096, 32768 * 8 + 1 };

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct bitmap b;

        CHECK(RESULT_IS_OK(bitmap_open(&b, sizes[i])));
        CHECK_EQ(bitmap_count(&b), 0);
        CHECK_EQ(bitmap_next_set(&b, 0), sizes[i]);
        CHECK_EQ(bitmap_next_clear(&b, 0), 0);
        bitmap_set_range(&b, 0, sizes[i]);
        CHECK_EQ(bitmap_count(&b), sizes[i]);
        CHECK_EQ(bitmap_next_clear(&b, 0), sizes[i]);
        CHECK_EQ(bitmap_next_set(&b, sizes[i] + 100), sizes[i]);
        bitmap_close(&b);
        CHECK(!b.words);
        bitmap_close(&b);
    }
}

static void test_one_bit(void)
{
    struct bitmap b;

    CHECK(RESULT_IS_OK(bitmap_open(&b, 130)));
    for (uint64_t i = 0; i < 130; i++) {
        CHECK(!bitmap_test(&b, i));
        CHECK(!bitmap_test_and_set(&b, i));
        CHECK(bitmap_test_and_set(&b, i));
        CHECK(bitmap_test(&b, i));
        CHECK_EQ(bitmap_count(&b), 1);
        CHECK_EQ(bitmap_next_set(&b, 0), i);
        CHECK_EQ(bitmap_next_set(&b, i + 1), 130);
        CHECK(bitmap_test_and_clear(&b, i));
        CHECK(!bitmap_test_and_clear(&b, i));
    }
    bitmap_close(&b);
}

/* Is the map what `wanted` says, asked in every way? */
static bool same(const struct bitmap *b, const bool *wanted)
{
    uint64_t count = 0;
    uint64_t set = b->bits;
    uint64_t clear = b->bits;
    bool ok = true;

    for (uint64_t i = b->bits; i-- > 0;) {
        set = wanted[i] ? i : set;
        clear = wanted[i] ? clear : i;
        count += wanted[i];
        ok = ok && bitmap_test(b, i) == wanted[i] &&
             bitmap_next_set(b, i) == set && bitmap_next_clear(b, i) == clear;
    }
    return ok && bitmap_count(b) == count;
}

#define SMALL 135

static void test_every_range(void)
{
    struct bitmap b;
    bool wanted[SMALL];

    CHECK(RESULT_IS_OK(bitmap_open(&b, SMALL)));
    for (uint64_t first = 0; first < SMALL; first++) {
        for (uint64_t count = 0; first + count <= SMALL; count++) {
            for (uint64_t i = 0; i < SMALL; i++) {
                wanted[i] = i >= first && i < first + count;
            }
            bitmap_set_range(&b, first, count);
            CHECK(same(&b, wanted));
            bitmap_clear_range(&b, 0, SMALL);
            CHECK_EQ(b.words[SMALL / 64], 0);
        }
    }
    for (uint64_t first = 0; first < SMALL; first++) {
        uint64_t count = SMALL - first < 70 ? SMALL - first : 70;

        for (uint64_t i = 0; i < SMALL; i++) {
            wanted[i] = i < first || i >= first + count;
        }
        bitmap_set_range(&b, 0, SMALL);
        bitmap_clear_range(&b, first, count);
        CHECK(same(&b, wanted));
    }
    bitmap_close(&b);
}

static int make_file(uint64_t length)
{
    int fd = memfd_create("bitmap", MFD_CLOEXEC);

    NEED(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
    return fd;
}

/* Whoever reads the file finds the received bitmap of the wire. */
static void test_file_and_order(void)
{
    static const uint8_t wanted[] = { 1, 2, 0, 0, 0, 0, 0, 0xc0, 0x3f, 0 };
    int fd = make_file(2 * bitmap_length(70));
    struct bitmap b;
    uint8_t bytes[sizeof(wanted)];

    CHECK(RESULT_IS_OK(bitmap_open_file(&b, 70, fd, bitmap_length(70))));
    bitmap_test_and_set(&b, 0);
    bitmap_test_and_set(&b, 9);
    bitmap_set_range(&b, 62, 8);
    CHECK_EQ(pread(fd, bytes, sizeof(bytes), (off_t)bitmap_length(70)),
             (ssize_t)sizeof(bytes));
    CHECK(memcmp(bytes, wanted, sizeof(bytes)) == 0);
    bitmap_close(&b);
    close(fd);
}

/* The bits are there for the next one, and none that there cannot be. */
static void test_left_behind(void)
{
    static const uint8_t all[16] = { [0 ... 15] = 0xff };
    int fd = make_file(bitmap_length(70));
    struct bitmap b;

    CHECK(RESULT_IS_OK(bitmap_open_file(&b, 70, fd, 0)));
    bitmap_set_range(&b, 3, 60);
    bitmap_close(&b);
    CHECK(RESULT_IS_OK(bitmap_open_file(&b, 70, fd, 0)));
    CHECK_EQ(bitmap_count(&b), 60);
    CHECK_EQ(bitmap_next_set(&b, 0), 3);
    bitmap_close(&b);
    CHECK_EQ(pwrite(fd, all, sizeof(all), 0), (ssize_t)sizeof(all));
    CHECK(RESULT_IS_OK(bitmap_open_file(&b, 70, fd, 0)));
    CHECK_EQ(bitmap_count(&b), 70);
    bitmap_close(&b);
    close(fd);
}

#define THREADS 4
#define SHARED_BITS 20000

struct share {
    struct bitmap *b;
    uint64_t index;
    uint64_t set; /* bits that this thread was the one to set */
    uint64_t cleared;
};

static struct result race_for_bits(void *arg)
{
    struct share *s = arg;

    for (uint64_t i = 0; i < SHARED_BITS; i++) {
        s->set += !bitmap_test_and_set(s->b, i);
    }
    for (uint64_t i = 0; i < SHARED_BITS; i++) {
        s->cleared += bitmap_test_and_clear(s->b, i);
    }
    return result_ok();
}

/* Every time a bit changes, exactly one thread is told so. */
static void test_one_winner(void)
{
    struct bitmap b;
    struct job jobs[THREADS];
    struct share shares[THREADS];
    uint64_t set = 0;
    uint64_t cleared = 0;

    CHECK(RESULT_IS_OK(bitmap_open(&b, SHARED_BITS)));
    for (uint64_t i = 0; i < THREADS; i++) {
        shares[i] = (struct share){ .b = &b, .index = i };
        job_start(&jobs[i], race_for_bits, &shares[i]);
    }
    for (uint64_t i = 0; i < THREADS; i++) {
        job_wait(&jobs[i]);
        set += shares[i].set;
        cleared += shares[i].cleared;
    }
    CHECK(set >= SHARED_BITS);
    CHECK_EQ(set - cleared, bitmap_count(&b));
    bitmap_close(&b);
}

#define STRIPE 37 /* no divisor of 64: threads share words */
#define STRIPES 400

static struct result change_stripes(void *arg)
{
    struct share *s = arg;

    for (int round = 0; round < 20; round++) {
        for (uint64_t i = s->index; i < STRIPES; i += THREADS) {
            bitmap_set_range(s->b, i * STRIPE, STRIPE);
            if (bitmap_next_clear(s->b, i * STRIPE) < (i + 1) * STRIPE) {
                return result_of(RESULT_HOST, "own bits lost");
            }
            bitmap_clear_range(s->b, i * STRIPE, STRIPE - 1);
        }
    }
    return result_ok();
}

/* Ranges of several threads in one word do not disturb each other. */
static void test_ranges_side_by_side(void)
{
    struct bitmap b;
    struct job jobs[THREADS];
    struct share shares[THREADS];

    CHECK(RESULT_IS_OK(bitmap_open(&b, STRIPE * STRIPES)));
    for (uint64_t i = 0; i < THREADS; i++) {
        shares[i] = (struct share){ .b = &b, .index = i };
        job_start(&jobs[i], change_stripes, &shares[i]);
    }
    for (uint64_t i = 0; i < THREADS; i++) {
        CHECK(RESULT_IS_OK(job_wait(&jobs[i])));
    }
    CHECK_EQ(bitmap_count(&b), STRIPES);
    for (uint64_t i = 0; i < STRIPES; i++) {
        CHECK(bitmap_test(&b, (i + 1) * STRIPE - 1));
    }
    bitmap_close(&b);
}

int main(void)
{
    RUN(test_sizes);
    RUN(test_one_bit);
    RUN(test_every_range);
    RUN(test_file_and_order);
    RUN(test_left_behind);
    RUN(test_one_winner);
    RUN(test_ranges_side_by_side);
    return check_status();
}
