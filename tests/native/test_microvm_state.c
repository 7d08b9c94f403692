/* microvm's device state: what it refuses, and that it reads what it writes. */
#include "check.h"
#include "state.h"

#include <stdlib.h>

static struct state state;
static struct fail why;

/* Two vCPUs, three records; to be freed. */
static uint8_t *make(size_t *length)
{
    struct state_writer w;

    state_begin(&w, STATE_KVM, 2);
    state_put(&w, STATE_REGS, 0, "zero", 4);
    state_put(&w, STATE_REGS, 1, "", 0);
    state_put(&w, STATE_CLOCK, STATE_WHOLE_VM, "clock", 5);
    CHECK_SOFT(state_end(&w, &why));
    *length = w.length;
    return w.bytes;
}

/* Is the state refused, with these words in the reason, once changed? */
static bool refused_with(size_t offset, uint8_t value, const char *words)
{
    size_t length;
    uint8_t *bytes = make(&length);
    bool refused;

    bytes[offset] = value;
    refused =
        !state_parse(bytes, length, &state, &why) && strstr(why.text, words);
    free(bytes);
    return refused;
}

static void test_round_trip(void)
{
    const struct state_record *r;
    size_t length;
    uint8_t *bytes = make(&length);

    CHECK(state_parse(bytes, length, &state, &why));
    CHECK_EQ(state.accel, STATE_KVM);
    CHECK_EQ(state.vcpus, 2);
    CHECK_EQ(state.count, 3);
    r = state_find(&state, 0, STATE_REGS);
    CHECK(r && r->length == 4);
    CHECK_BYTES(r->bytes, "zero", 4);
    r = state_find(&state, 1, STATE_REGS);
    CHECK(r && r->length == 0);
    r = state_find(&state, STATE_WHOLE_VM, STATE_CLOCK);
    CHECK(r && r->length == 5);
    CHECK(!state_find(&state, 0, STATE_CLOCK));
    CHECK(!state_find(&state, 0, STATE_MSRS));
    free(bytes);
}

static void test_header_is_big_endian(void)
{
    size_t length;
    uint8_t *bytes = make(&length);

    CHECK_BYTES(bytes, "PCDSTATE\0\0\0\1\0\0\0\1\0\0\0\2\0\0\0\3", 24);
    CHECK_BYTES(bytes + 24, "\0\0\0\4\0\0\0\0\0\0\0\4zero", 16);
    free(bytes);
}

static void test_large_state(void)
{
    static uint8_t part[STATE_RECORD_MAX];
    struct state_writer w;

    state_begin(&w, STATE_KVM, 1);
    memset(part, 7, sizeof(part));
    state_put(&w, STATE_XSAVE, 0, part, sizeof(part));
    state_put(&w, STATE_MSRS, 0, part, sizeof(part));
    CHECK(state_end(&w, &why));
    CHECK(state_parse(w.bytes, w.length, &state, &why));
    CHECK_EQ(state.records[1].length, STATE_RECORD_MAX);
    CHECK_BYTES(state.records[1].bytes, part, sizeof(part));
    free(w.bytes);
}

static void test_record_too_long(void)
{
    static uint8_t part[STATE_RECORD_MAX + 1];
    struct state_writer w;

    state_begin(&w, STATE_KVM, 1);
    state_put(&w, STATE_XSAVE, 0, part, sizeof(part));
    CHECK(state_end(&w, &why));
    CHECK(!state_parse(w.bytes, w.length, &state, &why));
    free(w.bytes);
}

static void test_foreign(void)
{
    CHECK(!state_parse("", 0, &state, &why));
    CHECK(
        !state_parse("QEVM this is another program's state", 36, &state, &why));
    CHECK(refused_with(0, 'Q', "no device state of microvm"));
}

static void test_newer(void)
{
    CHECK(refused_with(11, 2, "has version 2, this program reads version 1"));
}

static void test_bad_counts(void)
{
    CHECK(refused_with(19, 0, "0 vCPUs"));
    CHECK(refused_with(19, 9, "9 vCPUs"));
    CHECK(refused_with(23, 0, "0 records"));
    CHECK(refused_with(22, 1, "259 records"));
    CHECK(refused_with(23, 2, "bytes follow"));
    CHECK(refused_with(23, 4, "ends inside of record 3"));
}

static void test_bad_records(void)
{
    CHECK(refused_with(27, 99, "unknown type 99"));
    CHECK(refused_with(27, 0, "unknown type 0"));
    CHECK(refused_with(31, 2, "vCPU 2 of 2"));
    CHECK(refused_with(31, 1, "repeats"));
    CHECK(refused_with(35, 200, "ends inside of record 0"));
    CHECK(refused_with(32, 255, "ends inside of record 0"));
}

/* The copy is exactly as long as the cut, so that a sanitizer sees more. */
static void test_cut_everywhere(void)
{
    size_t length;
    uint8_t *bytes = make(&length);

    for (size_t cut = 0; cut < length; cut++) {
        uint8_t *copy = malloc(cut + !cut);

        memcpy(copy, bytes, cut);
        CHECK(!state_parse(copy, cut, &state, &why));
        free(copy);
    }
    free(bytes);
}

static void test_any_byte_changed(void)
{
    size_t length;
    uint8_t *bytes = make(&length);

    for (size_t at = 0; at < length; at++) {
        for (unsigned value = 0; value < 256; value++) {
            uint8_t old = bytes[at];

            bytes[at] = (uint8_t)value;
            state_parse(bytes, length, &state, &why);
            bytes[at] = old;
        }
    }
    CHECK(state_parse(bytes, length, &state, &why));
    free(bytes);
}

int main(void)
{
    RUN(test_round_trip);
    RUN(test_header_is_big_endian);
    RUN(test_large_state);
    RUN(test_record_too_long);
    RUN(test_foreign);
    RUN(test_newer);
    RUN(test_bad_counts);
    RUN(test_bad_records);
    RUN(test_cut_everywhere);
    RUN(test_any_byte_changed);
    return check_status();
}
