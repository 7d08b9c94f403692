/*
 * Version 1 of the format. Integers are 32 bits, big-endian.
 *
 *     offset  0  8 bytes   "PCDSTATE"
 *             8  version   1
 *            12  accel     1 KVM, 2 threads of a process
 *            16  vCPUs     1 to 8
 *            20  records   1 to 256
 *            24  the records, one behind the other, and then nothing:
 *                  type      what it is (state.h)
 *                  vCPU      whose it is; 0xffffffff: of the whole VM
 *                  length    up to 512 KiB
 *                  that many bytes
 *
 * A vCPU has at most one record of a type. Reading refuses what it doesn't
 * know: state that is left out is a guest that fails later. A change that
 * older programs must not ignore raises the version, which is also the version
 * of the device in the attach message.
 */
#include "state.h"

#include <stdlib.h>
#include <string.h>

#define MAGIC "PCDSTATE"
#define HEADER_SIZE 24u
#define RECORD_HEADER_SIZE 12u
#define RECORDS_OFFSET 20u

static uint32_t get32(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 |
           (uint32_t)bytes[2] << 8 | bytes[3];
}

static void put32(uint8_t *bytes, uint32_t value)
{
    bytes[0] = (uint8_t)(value >> 24);
    bytes[1] = (uint8_t)(value >> 16);
    bytes[2] = (uint8_t)(value >> 8);
    bytes[3] = (uint8_t)value;
}

/* Reading */

static bool parse_header(const uint8_t *bytes, size_t length,
                         struct state *state, struct fail *why)
{
    if (length < HEADER_SIZE || memcmp(bytes, MAGIC, 8) != 0)
        return fail(why, "this is no device state of microvm");
    if (get32(bytes + 8) != STATE_VERSION)
        return fail(why,
                    "the device state has version %u, this program reads "
                    "version %u",
                    get32(bytes + 8), STATE_VERSION);
    state->accel = get32(bytes + 12);
    state->vcpus = get32(bytes + 16);
    state->count = get32(bytes + RECORDS_OFFSET);
    if (state->vcpus < 1 || state->vcpus > STATE_VCPUS_MAX)
        return fail(why, "the device state has %u vCPUs", state->vcpus);
    if (state->count < 1 || state->count > STATE_RECORDS_MAX)
        return fail(why, "the device state has %u records", state->count);
    return true;
}

static bool check_record(const struct state *state, uint32_t index,
                         struct fail *why)
{
    const struct state_record *r = &state->records[index];
    const struct state_record *first = state_find(state, r->vcpu, r->type);

    if (r->type < STATE_MP_STATE || r->type > STATE_WORKER)
        return fail(why,
                    "record %u of the device state has the unknown type "
                    "%u",
                    index, r->type);
    if (r->vcpu >= state->vcpus && r->vcpu != STATE_WHOLE_VM)
        return fail(why, "record %u of the device state is about vCPU %u of %u",
                    index, r->vcpu, state->vcpus);
    if (first != r)
        return fail(why, "record %u of the device state repeats another one",
                    index);
    return true;
}

static bool parse_record(const uint8_t *bytes, size_t length, size_t *at,
                         struct state_record *r)
{
    size_t left = length - *at;

    if (left < RECORD_HEADER_SIZE)
        return false;
    left -= RECORD_HEADER_SIZE;
    r->type = get32(bytes + *at);
    r->vcpu = get32(bytes + *at + 4);
    r->length = get32(bytes + *at + 8);
    r->bytes = bytes + *at + RECORD_HEADER_SIZE;
    if (r->length > STATE_RECORD_MAX || r->length > left)
        return false;
    *at += RECORD_HEADER_SIZE + r->length;
    return true;
}

bool state_parse(const void *bytes, size_t length, struct state *state,
                 struct fail *why)
{
    size_t at = HEADER_SIZE;

    *state = (struct state){ 0 };
    if (!parse_header(bytes, length, state, why))
        return false;
    for (uint32_t i = 0; i < state->count; i++) {
        if (!parse_record(bytes, length, &at, &state->records[i]))
            return fail(why, "the device state ends inside of record %u of %u",
                        i, state->count);
        if (!check_record(state, i, why))
            return false;
    }
    if (at != length)
        return fail(why, "%zu bytes follow the device state", length - at);
    return true;
}

const struct state_record *state_find(const struct state *state, uint32_t vcpu,
                                      uint32_t type)
{
    for (uint32_t i = 0; i < state->count; i++) {
        const struct state_record *r = &state->records[i];

        if (r->bytes && r->vcpu == vcpu && r->type == type)
            return r;
    }
    return NULL;
}

/* Writing */

/* Room for `size` more bytes; NULL without memory, now and ever after. */
static uint8_t *extend(struct state_writer *w, size_t size)
{
    if (w->capacity - w->length < size) {
        size_t capacity = 2 * (w->length + size);
        uint8_t *bytes = w->bytes ? realloc(w->bytes, capacity) : NULL;

        if (!bytes) {
            free(w->bytes);
            w->bytes = NULL;
            return NULL;
        }
        w->bytes = bytes;
        w->capacity = capacity;
    }
    w->length += size;
    return w->bytes ? w->bytes + w->length - size : NULL;
}

void state_begin(struct state_writer *w, uint32_t accel, uint32_t vcpus)
{
    uint8_t *header;

    *w = (struct state_writer){ .bytes = malloc(65536), .capacity = 65536 };
    header = extend(w, HEADER_SIZE);
    if (!header)
        return;
    memcpy(header, MAGIC, 8);
    put32(header + 8, STATE_VERSION);
    put32(header + 12, accel);
    put32(header + 16, vcpus);
}

void state_put(struct state_writer *w, uint32_t type, uint32_t vcpu,
               const void *bytes, size_t length)
{
    uint8_t *record = extend(w, RECORD_HEADER_SIZE + length);

    if (!record)
        return;
    put32(record, type);
    put32(record + 4, vcpu);
    put32(record + 8, (uint32_t)length);
    memcpy(record + RECORD_HEADER_SIZE, bytes, length);
    w->records++;
}

bool state_end(struct state_writer *w, struct fail *why)
{
    if (!w->bytes)
        return fail(why, "no memory for the device state");
    put32(w->bytes + RECORDS_OFFSET, w->records);
    return true;
}
