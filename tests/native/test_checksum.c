#include "checksum.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define REGIONS 8
/* The last region is cut off. */
#define LENGTH (REGIONS * CHECKSUM_REGION + 3 * PAGE)

/* A block in a memfd, `start` bytes into it, of holes at first. */
struct sample {
    struct checksum_extent extent;
    uint8_t *map;
    uint32_t values[REGIONS + 1];
};

static void sample_open(struct sample *s, uint64_t start)
{
    int fd = memfd_create("stored", MFD_CLOEXEC);
    void *map;

    NEED(fd >= 0 && ftruncate(fd, (off_t)(start + LENGTH)) == 0);
    map = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
               (off_t)start);
    NEED(map != MAP_FAILED);
    *s = (struct sample){
        .extent = { .fd = fd, .start = start, .length = LENGTH }, .map = map
    };
}

static void sample_close(struct sample *s)
{
    munmap(s->map, LENGTH);
    close(s->extent.fd);
}

static void sample_fill(struct sample *s)
{
    for (uint64_t at = 0; at < LENGTH; at += PAGE) {
        pattern_fill(s->map + at, at + 1);
    }
}

static uint64_t allocated(const struct sample *s)
{
    struct stat st;

    NEED(fstat(s->extent.fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512;
}

/* One bit after the other, as the polynomial is written down. */
static uint32_t crc32c_by_bits(const uint8_t *data, size_t length)
{
    uint32_t crc = UINT32_MAX;

    for (size_t i = 0; i < length; i++) {
        crc ^= data[i];
        for (unsigned bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? UINT32_C(0x82f63b78) : 0);
        }
    }
    return ~crc;
}

/* RFC 3720, appendix B.4. */
static void test_known_values(void)
{
    uint8_t data[32];

    CHECK_EQ(crc32c(0, "123456789", 9), 0xe3069283);
    CHECK_EQ(crc32c(0, "", 0), 0);
    memset(data, 0, sizeof(data));
    CHECK_EQ(crc32c(0, data, sizeof(data)), 0x8a9136aa);
    memset(data, 0xff, sizeof(data));
    CHECK_EQ(crc32c(0, data, sizeof(data)), 0x62a8ab43);
    for (uint8_t i = 0; i < sizeof(data); i++) {
        data[i] = i;
    }
    CHECK_EQ(crc32c(0, data, sizeof(data)), 0x46dd794e);
}

/* Every length and every alignment, with and without the instruction. */
static void test_twins(void)
{
    uint8_t data[128 + 8];
    uint64_t seed = 1;

    for (size_t i = 0; i < sizeof(data); i++) {
        data[i] = (uint8_t)next_random(&seed);
    }
    for (size_t from = 0; from < 8; from++) {
        for (size_t length = 0; length <= 128; length++) {
            uint32_t want = crc32c_by_bits(data + from, length);
            size_t half = length / 3;

            CHECK_EQ(crc32c(0, data + from, length), want);
            CHECK_EQ(crc32c_portable(0, data + from, length), want);
            /* In two pieces. */
            CHECK_EQ(crc32c(crc32c(0, data + from, half), data + from + half,
                            length - half),
                     want);
            CHECK_EQ(crc32c_portable(crc32c_portable(0, data + from, half),
                                     data + from + half, length - half),
                     want);
        }
    }
}

static void test_hole_is_known(void)
{
    uint8_t *zeroes = calloc(1, CHECKSUM_REGION);

    NEED(zeroes);
    CHECK_EQ(crc32c(0, zeroes, CHECKSUM_REGION), CHECKSUM_OF_HOLE);
    free(zeroes);
}

/* All that is data, at the beginning of a file and within one. */
static void test_regions(void)
{
    for (uint64_t start = 0; start <= 5 * PAGE; start += 5 * PAGE) {
        struct sample s;

        sample_open(&s, start);
        sample_fill(&s);
        CHECK(RESULT_IS_OK(checksum_file(&s.extent, s.values, -1)));
        for (uint64_t i = 0; i <= REGIONS; i++) {
            uint64_t length = i < REGIONS ? CHECKSUM_REGION : 3 * PAGE;

            CHECK_EQ(s.values[i],
                     crc32c_by_bits(s.map + i * CHECKSUM_REGION, length));
            CHECK(RESULT_IS_OK(
                checksum_verify_region(s.map, LENGTH, i, s.values[i])));
        }
        CHECK(RESULT_IS_OK(checksum_verify_file(&s.extent, s.values, -1)));
        sample_close(&s);
    }
}

/* Holes of any shape read as zeroes and are not filled by being read. */
static void test_holes(void)
{
    uint64_t seed = 7;

    for (unsigned round = 0; round < 50; round++) {
        struct sample s;
        uint64_t before;

        sample_open(&s, round % 3 * PAGE);
        for (uint64_t at = 0; at < LENGTH; at += PAGE) {
            if (next_random(&seed) % (1 + round) == 0) {
                pattern_fill(s.map + at, at + 1);
            }
        }
        before = allocated(&s);
        CHECK(RESULT_IS_OK(checksum_file(&s.extent, s.values, -1)));
        CHECK(RESULT_IS_OK(checksum_verify_file(&s.extent, s.values, -1)));
        CHECK_EQ(allocated(&s), before);
        for (uint64_t i = 0; i <= REGIONS; i++) {
            uint64_t length = i < REGIONS ? CHECKSUM_REGION : 3 * PAGE;

            CHECK_EQ(s.values[i],
                     crc32c_by_bits(s.map + i * CHECKSUM_REGION, length));
        }
        sample_close(&s);
    }
}

/* Any bit that changes is found, in its region. */
static void test_flips(void)
{
    struct sample s;
    uint64_t seed = 3;

    sample_open(&s, PAGE);
    pattern_fill(s.map + CHECKSUM_REGION, 1);
    pattern_fill(s.map + LENGTH - PAGE, 2);
    CHECK(RESULT_IS_OK(checksum_file(&s.extent, s.values, -1)));
    for (unsigned i = 0; i < 500; i++) {
        uint64_t at = next_random(&seed) % LENGTH;
        uint8_t bit = (uint8_t)(1 << next_random(&seed) % 8);
        uint64_t region = at >> CHECKSUM_REGION_BITS;
        struct result r;

        s.map[at] ^= bit;
        r = checksum_verify_file(&s.extent, s.values, -1);
        CHECK_EQ(r.kind, RESULT_HOST);
        CHECK_EQ(r.err, EBADMSG);
        CHECK_EQ(r.offset, region << CHECKSUM_REGION_BITS);
        CHECK(r.got != s.values[region]);
        r = checksum_verify_region(s.map, LENGTH, region, s.values[region]);
        CHECK_EQ(r.offset, region << CHECKSUM_REGION_BITS);
        CHECK_EQ(r.err, EBADMSG);
        s.map[at] ^= bit;
    }
    CHECK(RESULT_IS_OK(checksum_verify_file(&s.extent, s.values, -1)));
    sample_close(&s);
}

/* A file that lost its end is an error, also where the end was a hole. */
static void test_cut_off(void)
{
    struct sample s;
    struct result r;

    sample_open(&s, 0);
    CHECK(RESULT_IS_OK(checksum_file(&s.extent, s.values, -1)));
    NEED(ftruncate(s.extent.fd, LENGTH - 1) == 0);
    r = checksum_verify_file(&s.extent, s.values, -1);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK(r.err != EBADMSG);
    CHECK_TEXT(r.what, "stored RAM is cut off");
    r = checksum_file(&s.extent, s.values, -1);
    CHECK_EQ(r.kind, RESULT_HOST);
    sample_close(&s);
}

static void test_stop(void)
{
    int stop = make_event();
    struct sample s;

    sample_open(&s, 0);
    set_event(stop);
    CHECK_EQ(checksum_file(&s.extent, s.values, stop).kind, RESULT_STOPPED);
    CHECK_EQ(checksum_verify_file(&s.extent, s.values, stop).kind,
             RESULT_STOPPED);
    close(stop);
    sample_close(&s);
}

/* In any order; each region is read once. */
static void test_on_first_use(void)
{
    struct sample s;
    struct checksums c;
    struct result r;

    sample_open(&s, PAGE);
    sample_fill(&s);
    CHECK(RESULT_IS_OK(checksum_file(&s.extent, s.values, -1)));
    CHECK(RESULT_IS_OK(checksums_open(&c, s.values, &s.extent)));

    CHECK(RESULT_IS_OK(checksums_verify(&c, LENGTH - PAGE, PAGE)));
    CHECK_EQ(bitmap_count(&c.verified), 1);
    CHECK(RESULT_IS_OK(checksums_verify(&c, CHECKSUM_REGION - PAGE, 2 * PAGE)));
    CHECK_EQ(bitmap_count(&c.verified), 3);

    /* Damage behind our back is not looked for again ... */
    s.map[5] ^= 1;
    CHECK(RESULT_IS_OK(checksums_verify(&c, 0, PAGE)));
    /* ... but is found where nobody has been. */
    s.map[3 * CHECKSUM_REGION + 77] ^= 1;
    r = checksums_verify(&c, 2 * CHECKSUM_REGION, 2 * CHECKSUM_REGION);
    CHECK_EQ(r.err, EBADMSG);
    CHECK_EQ(r.offset, 3 * CHECKSUM_REGION);
    CHECK(bitmap_test(&c.verified, 2));
    CHECK(!bitmap_test(&c.verified, 3));
    checksums_close(&c);
    sample_close(&s);
}

/* --- threads -------------------------------------------------------------- */

#define THREADS 4

static struct result verify_all(void *arg)
{
    struct checksums *c = arg;
    uint64_t seed = (uint64_t)(uintptr_t)&seed;
    struct result r = result_ok();

    for (unsigned i = 0; i < 400 && RESULT_IS_OK(r); i++) {
        uint64_t page = next_random(&seed) % (LENGTH / PAGE);

        r = checksums_verify(c, page * PAGE, PAGE);
    }
    return r;
}

static void test_threads(void)
{
    struct sample s;
    struct checksums c;
    struct job jobs[THREADS];

    sample_open(&s, 0);
    sample_fill(&s);
    CHECK(RESULT_IS_OK(checksum_file(&s.extent, s.values, -1)));
    CHECK(RESULT_IS_OK(checksums_open(&c, s.values, &s.extent)));
    for (unsigned i = 0; i < THREADS; i++) {
        job_start(&jobs[i], verify_all, &c);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        CHECK(RESULT_IS_OK(job_wait(&jobs[i])));
    }
    CHECK_EQ(bitmap_count(&c.verified), REGIONS + 1);
    checksums_close(&c);
    sample_close(&s);
}

int main(void)
{
    printf("crc32c by %s\n",
           crc32c_has_instruction() ? "instruction" : "table");
    RUN(test_known_values);
    RUN(test_twins);
    RUN(test_hole_is_known);
    RUN(test_regions);
    RUN(test_holes);
    RUN(test_flips);
    RUN(test_cut_off);
    RUN(test_stop);
    RUN(test_on_first_use);
    RUN(test_threads);
    return check_status();
}
