/*
 * What microvm reads from others: attach messages, device state, kernel files.
 * The first byte of the input says which.
 */
#include "attach.h"
#include "kernel.h"
#include "state.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_records(const struct state *state)
{
    volatile uint8_t last;

    for (uint32_t i = 0; i < state->count; i++) {
        const struct state_record *r = &state->records[i];

        if (r->length > 0)
            last = r->bytes[r->length - 1];
        if (state_find(state, r->vcpu, r->type) != r)
            abort();
    }
    (void)last;
}

static void read_segments(const struct kernel *kernel, const uint8_t *file)
{
    volatile uint8_t last;

    for (size_t i = 0; i < kernel->count; i++) {
        const struct kernel_segment *s = &kernel->segments[i];

        if (s->file_size > 0)
            last = file[s->offset + s->file_size - 1];
        if (s->address < 0x100000 || s->address + s->memory_size > 0x800000)
            abort();
    }
    (void)last;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct attach_message message;
    static struct kernel kernel;
    static struct state state;
    struct fail why;

    if (size == 0)
        return 0;
    switch (data[0] % 4) {
    case 0:
        if (state_parse(data + 1, size - 1, &state, &why))
            read_records(&state);
        break;
    case 1:
        if (kernel_parse(data + 1, size - 1, 0x100000, 0x800000, &kernel, &why))
            read_segments(&kernel, data + 1);
        break;
    default:
        attach_parse(data + 1, size - 1, &message, &why);
        break;
    }
    return 0;
}
