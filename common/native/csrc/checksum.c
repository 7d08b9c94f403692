#include "checksum.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

/* --- CRC32C --------------------------------------------------------------- */

/* Of each byte: eight steps of the reflected polynomial 0x82f63b78. */
static const uint32_t byte_table[256] = {
    0x00000000, 0xf26b8303, 0xe13b70f7, 0x1350f3f4, 0xc79a971f, 0x35f1141c,
    0x26a1e7e8, 0xd4ca64eb, 0x8ad958cf, 0x78b2dbcc, 0x6be22838, 0x9989ab3b,
    0x4d43cfd0, 0xbf284cd3, 0xac78bf27, 0x5e133c24, 0x105ec76f, 0xe235446c,
    0xf165b798, 0x030e349b, 0xd7c45070, 0x25afd373, 0x36ff2087, 0xc494a384,
    0x9a879fa0, 0x68ec1ca3, 0x7bbcef57, 0x89d76c54, 0x5d1d08bf, 0xaf768bbc,
    0xbc267848, 0x4e4dfb4b, 0x20bd8ede, 0xd2d60ddd, 0xc186fe29, 0x33ed7d2a,
    0xe72719c1, 0x154c9ac2, 0x061c6936, 0xf477ea35, 0xaa64d611, 0x580f5512,
    0x4b5fa6e6, 0xb93425e5, 0x6dfe410e, 0x9f95c20d, 0x8cc531f9, 0x7eaeb2fa,
    0x30e349b1, 0xc288cab2, 0xd1d83946, 0x23b3ba45, 0xf779deae, 0x05125dad,
    0x1642ae59, 0xe4292d5a, 0xba3a117e, 0x4851927d, 0x5b016189, 0xa96ae28a,
    0x7da08661, 0x8fcb0562, 0x9c9bf696, 0x6ef07595, 0x417b1dbc, 0xb3109ebf,
    0xa0406d4b, 0x522bee48, 0x86e18aa3, 0x748a09a0, 0x67dafa54, 0x95b17957,
    0xcba24573, 0x39c9c670, 0x2a993584, 0xd8f2b687, 0x0c38d26c, 0xfe53516f,
    0xed03a29b, 0x1f682198, 0x5125dad3, 0xa34e59d0, 0xb01eaa24, 0x42752927,
    0x96bf4dcc, 0x64d4cecf, 0x77843d3b, 0x85efbe38, 0xdbfc821c, 0x2997011f,
    0x3ac7f2eb, 0xc8ac71e8, 0x1c661503, 0xee0d9600, 0xfd5d65f4, 0x0f36e6f7,
    0x61c69362, 0x93ad1061, 0x80fde395, 0x72966096, 0xa65c047d, 0x5437877e,
    0x4767748a, 0xb50cf789, 0xeb1fcbad, 0x197448ae, 0x0a24bb5a, 0xf84f3859,
    0x2c855cb2, 0xdeeedfb1, 0xcdbe2c45, 0x3fd5af46, 0x7198540d, 0x83f3d70e,
    0x90a324fa, 0x62c8a7f9, 0xb602c312, 0x44694011, 0x5739b3e5, 0xa55230e6,
    0xfb410cc2, 0x092a8fc1, 0x1a7a7c35, 0xe811ff36, 0x3cdb9bdd, 0xceb018de,
    0xdde0eb2a, 0x2f8b6829, 0x82f63b78, 0x709db87b, 0x63cd4b8f, 0x91a6c88c,
    0x456cac67, 0xb7072f64, 0xa457dc90, 0x563c5f93, 0x082f63b7, 0xfa44e0b4,
    0xe9141340, 0x1b7f9043, 0xcfb5f4a8, 0x3dde77ab, 0x2e8e845f, 0xdce5075c,
    0x92a8fc17, 0x60c37f14, 0x73938ce0, 0x81f80fe3, 0x55326b08, 0xa759e80b,
    0xb4091bff, 0x466298fc, 0x1871a4d8, 0xea1a27db, 0xf94ad42f, 0x0b21572c,
    0xdfeb33c7, 0x2d80b0c4, 0x3ed04330, 0xccbbc033, 0xa24bb5a6, 0x502036a5,
    0x4370c551, 0xb11b4652, 0x65d122b9, 0x97baa1ba, 0x84ea524e, 0x7681d14d,
    0x2892ed69, 0xdaf96e6a, 0xc9a99d9e, 0x3bc21e9d, 0xef087a76, 0x1d63f975,
    0x0e330a81, 0xfc588982, 0xb21572c9, 0x407ef1ca, 0x532e023e, 0xa145813d,
    0x758fe5d6, 0x87e466d5, 0x94b49521, 0x66df1622, 0x38cc2a06, 0xcaa7a905,
    0xd9f75af1, 0x2b9cd9f2, 0xff56bd19, 0x0d3d3e1a, 0x1e6dcdee, 0xec064eed,
    0xc38d26c4, 0x31e6a5c7, 0x22b65633, 0xd0ddd530, 0x0417b1db, 0xf67c32d8,
    0xe52cc12c, 0x1747422f, 0x49547e0b, 0xbb3ffd08, 0xa86f0efc, 0x5a048dff,
    0x8ecee914, 0x7ca56a17, 0x6ff599e3, 0x9d9e1ae0, 0xd3d3e1ab, 0x21b862a8,
    0x32e8915c, 0xc083125f, 0x144976b4, 0xe622f5b7, 0xf5720643, 0x07198540,
    0x590ab964, 0xab613a67, 0xb831c993, 0x4a5a4a90, 0x9e902e7b, 0x6cfbad78,
    0x7fab5e8c, 0x8dc0dd8f, 0xe330a81a, 0x115b2b19, 0x020bd8ed, 0xf0605bee,
    0x24aa3f05, 0xd6c1bc06, 0xc5914ff2, 0x37faccf1, 0x69e9f0d5, 0x9b8273d6,
    0x88d28022, 0x7ab90321, 0xae7367ca, 0x5c18e4c9, 0x4f48173d, 0xbd23943e,
    0xf36e6f75, 0x0105ec76, 0x12551f82, 0xe03e9c81, 0x34f4f86a, 0xc69f7b69,
    0xd5cf889d, 0x27a40b9e, 0x79b737ba, 0x8bdcb4b9, 0x988c474d, 0x6ae7c44e,
    0xbe2da0a5, 0x4c4623a6, 0x5f16d052, 0xad7d5351,
};

uint32_t crc32c_portable(uint32_t before, const void *data, size_t length)
{
    const uint8_t *in = data;
    uint32_t crc = ~before;

    for (size_t i = 0; i < length; i++) {
        crc = byte_table[(crc ^ in[i]) & 0xff] ^ crc >> 8;
    }
    return ~crc;
}

#if defined(__x86_64__)

__attribute__((target("sse4.2"))) static uint32_t
crc32c_instruction(uint32_t before, const void *data, size_t length)
{
    const uint8_t *in = data;
    uint64_t crc = ~before & UINT32_MAX;
    size_t i = 0;

    for (; i + sizeof(uint64_t) <= length; i += sizeof(uint64_t)) {
        uint64_t word;

        memcpy(&word, in + i, sizeof(word));
        crc = _mm_crc32_u64(crc, word);
    }
    for (; i < length; i++) {
        crc = _mm_crc32_u8((uint32_t)crc, in[i]);
    }
    return ~(uint32_t)crc;
}

bool crc32c_has_instruction(void)
{
    return __builtin_cpu_supports("sse4.2");
}

#else

static uint32_t crc32c_instruction(uint32_t before, const void *data,
                                   size_t length)
{
    return crc32c_portable(before, data, length);
}

bool crc32c_has_instruction(void)
{
    return false;
}

#endif

uint32_t crc32c(uint32_t before, const void *data, size_t length)
{
    return crc32c_has_instruction() ? crc32c_instruction(before, data, length) :
                                      crc32c_portable(before, data, length);
}

/* --- regions of a file ---------------------------------------------------- */

/* Reading a block's regions in order. */
struct reading {
    const struct checksum_extent *extent;
    uint8_t *buffer;     /* one region */
    uint64_t data_start; /* [data_start, data_end) of the block is no hole, */
    uint64_t data_end;   /* and what is before it, from where we are, is one */
};

static struct result reading_open(struct reading *r,
                                  const struct checksum_extent *e)
{
    *r = (struct reading){ .extent = e };
    r->buffer = malloc(CHECKSUM_REGION);
    return r->buffer ? result_ok() :
                       result_errno(RESULT_HOST, "memory for a region", ENOMEM);
}

static void reading_close(struct reading *r)
{
    free(r->buffer);
}

static bool is_cut_off(const struct checksum_extent *e)
{
    struct stat file;

    return fstat(e->fd, &file) < 0 ||
           (uint64_t)file.st_size < e->start + e->length;
}

/* A file system that cannot tell has data everywhere. */
static void find_data(struct reading *r, uint64_t offset)
{
    const struct checksum_extent *e = r->extent;
    off_t from = (off_t)(e->start + offset);
    off_t data = lseek(e->fd, from, SEEK_DATA);
    off_t hole;

    if (data < 0) {
        /* ENXIO: nothing but a hole up to the end of the file, if it has not
         * been cut off just now. */
        r->data_start = errno == ENXIO && !is_cut_off(e) ? e->length : offset;
        r->data_end = e->length;
        return;
    }
    hole = lseek(e->fd, data, SEEK_HOLE);
    r->data_start = (uint64_t)data - e->start;
    r->data_end = hole < 0 ? e->length : (uint64_t)hole - e->start;
}

static bool is_hole(struct reading *r, uint64_t offset, uint64_t length)
{
    if (offset >= r->data_end) {
        find_data(r, offset);
    }
    return offset + length <= r->data_start;
}

static struct result failed(const char *what, int err, uint64_t offset)
{
    struct result r = result_errno(RESULT_HOST, what, err);

    r.offset = offset;
    return r;
}

static struct result read_region(struct reading *r, uint64_t offset,
                                 uint64_t length)
{
    const struct checksum_extent *e = r->extent;
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pread(e->fd, r->buffer + done, length - done,
                          (off_t)(e->start + offset + done));

        if (n < 0 && errno != EINTR) {
            return failed("read of stored RAM", errno, offset + done);
        }
        if (n == 0) {
            return failed("stored RAM is cut off", 0, offset + done);
        }
        done += n > 0 ? (uint64_t)n : 0;
    }
    return result_ok();
}

static uint64_t region_length(uint64_t length, uint64_t region)
{
    uint64_t left = length - (region << CHECKSUM_REGION_BITS);

    return left < CHECKSUM_REGION ? left : CHECKSUM_REGION;
}

/* The checksum of `length` zeroes; of a whole region it is known. */
static uint32_t checksum_of_zeroes(uint64_t length)
{
    static const uint8_t zeroes[4096];
    uint32_t crc = 0;

    if (length == CHECKSUM_REGION) {
        return CHECKSUM_OF_HOLE;
    }
    for (uint64_t done = 0; done < length; done += sizeof(zeroes)) {
        uint64_t left = length - done;

        crc =
            crc32c(crc, zeroes, left < sizeof(zeroes) ? left : sizeof(zeroes));
    }
    return crc;
}

static struct result checksum_read(struct reading *r, uint64_t region,
                                   uint32_t *value)
{
    uint64_t length = region_length(r->extent->length, region);
    struct result result =
        read_region(r, region << CHECKSUM_REGION_BITS, length);

    if (RESULT_IS_OK(result)) {
        *value = crc32c(0, r->buffer, length);
    }
    return result;
}

static struct result checksum_region(struct reading *r, uint64_t region,
                                     uint32_t *value)
{
    uint64_t length = region_length(r->extent->length, region);

    if (is_hole(r, region << CHECKSUM_REGION_BITS, length)) {
        *value = checksum_of_zeroes(length);
        return result_ok();
    }
    return checksum_read(r, region, value);
}

static struct result differs(uint64_t region, uint32_t got)
{
    struct result r = failed("stored RAM is not what it was", EBADMSG,
                             region << CHECKSUM_REGION_BITS);

    r.got = got;
    return r;
}

static bool is_stopped(int stop_fd)
{
    struct pollfd stop = { .fd = stop_fd, .events = POLLIN };

    return stop_fd >= 0 && poll(&stop, 1, 0) > 0;
}

/* Exactly one of `store` and `expected` is there. */
static struct result every_region(const struct checksum_extent *e,
                                  uint32_t *store, const uint32_t *expected,
                                  int stop_fd)
{
    uint64_t regions = checksum_regions(e->length);
    struct reading reading;
    struct result r = reading_open(&reading, e);

    for (uint64_t i = 0; i < regions && RESULT_IS_OK(r); i++) {
        uint32_t value = 0;

        r = is_stopped(stop_fd) ? result_of(RESULT_STOPPED, "") :
                                  checksum_region(&reading, i, &value);
        if (store) {
            store[i] = value;
        } else if (RESULT_IS_OK(r) && value != expected[i]) {
            r = differs(i, value);
        }
    }
    reading_close(&reading);
    return r;
}

struct result checksum_file(const struct checksum_extent *e, uint32_t *values,
                            int stop_fd)
{
    return every_region(e, values, NULL, stop_fd);
}

struct result checksum_verify_file(const struct checksum_extent *e,
                                   const uint32_t *values, int stop_fd)
{
    return every_region(e, NULL, values, stop_fd);
}

/* --- regions in any order ------------------------------------------------- */

struct result checksum_verify_region(const uint8_t *map, uint64_t length,
                                     uint64_t region, uint32_t expected)
{
    uint32_t got = crc32c(0, map + (region << CHECKSUM_REGION_BITS),
                          region_length(length, region));

    return got == expected ? result_ok() : differs(region, got);
}

struct result checksums_open(struct checksums *c, const uint32_t *values,
                             const struct checksum_extent *e)
{
    *c = (struct checksums){ .values = values, .extent = *e };
    return bitmap_open(&c->verified, checksum_regions(e->length));
}

void checksums_close(struct checksums *c)
{
    bitmap_close(&c->verified);
}

/*
 * Read, hole or not: where data ends a file system finds by a walk over all of
 * it, which is milliseconds for a GiB and pays for many regions only.
 */
static struct result verify_once(struct checksums *c, struct reading *reading,
                                 uint64_t region)
{
    uint32_t value = 0;
    struct result r = checksum_read(reading, region, &value);

    if (RESULT_IS_OK(r) && value != c->values[region]) {
        return differs(region, value);
    }
    if (RESULT_IS_OK(r)) {
        bitmap_test_and_set(&c->verified, region);
    }
    return r;
}

struct result checksums_verify(struct checksums *c, uint64_t offset,
                               uint64_t length)
{
    uint64_t region = offset >> CHECKSUM_REGION_BITS;
    uint64_t end = checksum_regions(offset + length);
    struct reading reading;
    struct result r;

    if (bitmap_all_set(&c->verified, region, end - region)) {
        return result_ok();
    }
    r = reading_open(&reading, &c->extent);
    for (; region < end && RESULT_IS_OK(r); region++) {
        if (!bitmap_test(&c->verified, region)) {
            r = verify_once(c, &reading, region);
        }
    }
    reading_close(&reading);
    return r;
}
