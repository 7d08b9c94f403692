#include "wire.h"

#include "check.h"
#include "support.h"

#include <sys/mman.h>
#include <unistd.h>

static struct ram ram;
static struct ram_block *small;
static struct ram_block *big;
static char long_name[IDSTR_MAX + 1];

static void open_ram(void)
{
    int fd = memfd_create("wire", MFD_CLOEXEC);

    memset(long_name, 'n', IDSTR_MAX);
    NEED(fd >= 0 && ftruncate(fd, (off_t)(64 * MIB)) == 0);
    NEED(RESULT_IS_OK(ram_open(&ram, 2)));
    NEED(RESULT_IS_OK(ram_add(&ram, "ram", 64 * MIB, PAGE, 0, fd)));
    NEED(RESULT_IS_OK(ram_add(&ram, long_name, 4 * MIB, PAGE, 0, fd)));
    small = &ram.blocks[0];
    big = &ram.blocks[1];
}

static enum wire_status decode(const void *bytes, size_t size,
                               struct ram_block **last, struct wire_record *rec,
                               const char **why)
{
    /* Of its very size, so that the sanitizer sees a byte too much read. */
    uint8_t *copy = malloc(size ? size : 1);
    enum wire_status status;

    NEED(copy);
    memcpy(copy, bytes, size);
    status = wire_get_record_untrusted(copy, size, &ram, last, rec, why);
    free(copy);
    return status;
}

/* The examples of a capture: a page, a zero page, the next zero page. */
static void test_known_bytes(void)
{
    static const uint8_t wanted[] = {
        0, 0, 0, 0, 0, 0, 0, 0x08, 3, 'r', 'a', 'm',
    };
    static const uint8_t zero[] = {
        0, 0, 0, 0, 0x01, 0x7f, 0xe0, 0x02, 3, 'r', 'a', 'm', 0,
    };
    static const uint8_t next[] = {
        0, 0, 0, 0, 0x01, 0x7f, 0xf0, 0x22, 0,
    };
    static const uint8_t part[] = { 2, 0, 0, 0, 1 };
    static const uint8_t tail[] = {
        0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 1,
    };
    const struct ram_block *last = NULL;
    uint8_t out[WIRE_HEADER_MAX];

    CHECK_EQ(wire_put_record(out, small, 0, false, &last), sizeof(wanted));
    CHECK_BYTES(out, wanted, sizeof(wanted));
    CHECK(last == small);
    last = NULL;
    CHECK_EQ(wire_put_record(out, small, 0x17fe000, true, &last), sizeof(zero));
    CHECK_BYTES(out, zero, sizeof(zero));
    CHECK_EQ(wire_put_record(out, small, 0x17ff000, true, &last), sizeof(next));
    CHECK_BYTES(out, next, sizeof(next));
    CHECK_EQ(wire_put_part_head(out, 1), sizeof(part));
    CHECK_BYTES(out, part, sizeof(part));
    CHECK_EQ(wire_put_part_tail(out, 1), sizeof(tail));
    CHECK_BYTES(out, tail, sizeof(tail));
}

static void test_random_records_come_back(void)
{
    const struct ram_block *out_last = NULL;
    struct ram_block *in_last = NULL;
    uint64_t random = 1;

    for (int i = 0; i < 20000; i++) {
        struct ram_block *b = next_random(&random) % 3 ? small : big;
        uint64_t offset = next_random(&random) % block_pages(b) * PAGE;
        bool zero = next_random(&random) % 2;
        bool named = out_last != b;
        uint8_t bytes[WIRE_HEADER_MAX];
        struct wire_record rec;
        const char *why = "";
        size_t n = wire_put_record(bytes, b, offset, zero, &out_last);

        CHECK(n <= WIRE_HEADER_MAX);
        CHECK_EQ(decode(bytes, n, &in_last, &rec, &why), WIRE_OK);
        CHECK(rec.block == b);
        CHECK_EQ(rec.offset, offset);
        CHECK_EQ(rec.length, n);
        CHECK_EQ(rec.flags, (zero ? RAM_SAVE_FLAG_ZERO : RAM_SAVE_FLAG_PAGE) |
                                (named ? 0 : RAM_SAVE_FLAG_CONTINUE));
        CHECK(in_last == b);
    }
}

/* A cut record asks for more and leaves the CONTINUE state alone. */
static void test_every_cut(void)
{
    for (int kind = 0; kind < 8; kind++) {
        struct ram_block *b = kind & 1 ? big : small;
        const struct ram_block *out_last = kind & 2 ? b : NULL;
        struct ram_block *before = kind & 2 ? b : NULL;
        uint8_t bytes[WIRE_HEADER_MAX];
        size_t n = wire_put_record(bytes, b, PAGE, kind & 4, &out_last);

        for (size_t cut = 0; cut <= n; cut++) {
            struct ram_block *last = before;
            struct wire_record rec;
            const char *why = "";

            CHECK_EQ(decode(bytes, cut, &last, &rec, &why),
                     cut == n ? WIRE_OK : WIRE_MORE);
            CHECK(last == (cut == n ? b : before));
        }
    }
}

static void test_records_that_stand_alone(void)
{
    static const uint64_t words[] = { RAM_SAVE_FLAG_EOS,
                                      RAM_SAVE_FLAG_MULTIFD_FLUSH };

    for (size_t i = 0; i < 2; i++) {
        struct ram_block *last = NULL;
        struct wire_record rec;
        const char *why = "";
        uint8_t bytes[8];

        wire_put_be64(bytes, words[i]);
        CHECK_EQ(decode(bytes, 8, &last, &rec, &why), WIRE_OK);
        CHECK(!rec.block && !last);
        CHECK_EQ(rec.length, 8);
        CHECK_EQ(rec.flags, words[i]);
    }
}

static bool refused(uint64_t word, const char *name, int fill,
                    struct ram_block *last, const char *reason)
{
    struct ram_block *kept = last;
    struct script s = { 0 };
    struct wire_record rec;
    const char *why = "";
    enum wire_status status;

    put_be64(&s, word);
    if (name) {
        put_name(&s, name);
    }
    if (fill >= 0) {
        put_byte(&s, (uint8_t)fill);
    }
    status = decode(s.bytes, s.size, &last, &rec, &why);
    script_free(&s);
    return CHECK_SOFT(status == WIRE_BAD) && CHECK_SOFT(strstr(why, reason)) &&
           CHECK_SOFT(last == kept);
}

static void test_refusals(void)
{
    /* Each flag word that is no page, no zero page and does not stand alone. */
    for (uint64_t flags = 0; flags < PAGE; flags++) {
        uint64_t plain = flags & ~RAM_SAVE_FLAG_CONTINUE;

        if (plain != RAM_SAVE_FLAG_PAGE && plain != RAM_SAVE_FLAG_ZERO &&
            flags != RAM_SAVE_FLAG_EOS &&
            flags != RAM_SAVE_FLAG_MULTIFD_FLUSH) {
            CHECK(refused(flags, "ram", 0, small, "flags"));
        }
    }
    CHECK(refused(0x08, "rom", -1, NULL, "does not have"));
    CHECK(refused(0x08, "", -1, small, "does not have"));
    CHECK(refused(0x08, "ra", -1, NULL, "does not have"));
    CHECK(refused(0x08, "ramm", -1, NULL, "does not have"));
    CHECK(refused(0x28, NULL, -1, NULL, "name its block"));
    CHECK(refused(64 * MIB | 0x08, "ram", -1, NULL, "past the end"));
    CHECK(refused(64 * MIB | 0x28, NULL, -1, small, "past the end"));
    CHECK(refused(~(PAGE - 1) | 0x28, NULL, -1, small, "past the end"));
    CHECK(refused(0x02, "ram", 1, NULL, "fill byte"));
    CHECK(refused(0x22, NULL, 0xff, small, "fill byte"));
}

static void test_last_page_of_a_block(void)
{
    struct ram_block *last = small;
    struct wire_record rec;
    const char *why = "";
    uint8_t bytes[8];

    wire_put_be64(bytes, (64 * MIB - PAGE) | 0x28);
    CHECK_EQ(decode(bytes, 8, &last, &rec, &why), WIRE_OK);
    CHECK_EQ(rec.offset, 64 * MIB - PAGE);
}

int main(void)
{
    open_ram();
    RUN(test_known_bytes);
    RUN(test_random_records_come_back);
    RUN(test_every_cut);
    RUN(test_records_that_stand_alone);
    RUN(test_refusals);
    RUN(test_last_page_of_a_block);
    close(ram.blocks[0].fd);
    ram_close(&ram);
    return check_status();
}
