#include "wire.h"

#include <string.h>

size_t wire_put_record(uint8_t *out, const struct ram_block *block,
                       uint64_t offset, bool zero,
                       const struct ram_block **last)
{
    uint64_t flags = zero ? RAM_SAVE_FLAG_ZERO : RAM_SAVE_FLAG_PAGE;
    size_t n = 8;

    if (*last == block) {
        flags |= RAM_SAVE_FLAG_CONTINUE;
    } else {
        out[n++] = block->idstr_length;
        memcpy(out + n, block->idstr, block->idstr_length);
        n += block->idstr_length;
        *last = block;
    }
    if (zero) {
        out[n++] = 0;
    }
    wire_put_be64(out, offset | flags);
    return n;
}

static void put_be16(uint8_t *out, size_t value)
{
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
}

size_t wire_put_discard(uint8_t *out, const struct ram_block *block,
                        const struct wire_range *ranges, uint32_t count)
{
    size_t n = COMMAND_HEAD;

    out[n++] = 0;
    out[n++] = block->idstr_length;
    memcpy(out + n, block->idstr, block->idstr_length);
    n += block->idstr_length;
    out[n++] = 0;
    for (uint32_t i = 0; i < count; i++) {
        wire_put_be64(out + n, ranges[i].start);
        wire_put_be64(out + n + 8, ranges[i].length);
        n += 16;
    }
    out[0] = SECTION_COMMAND;
    put_be16(out + 1, COMMAND_RAM_DISCARD);
    put_be16(out + 3, n - COMMAND_HEAD);
    return n;
}

size_t wire_put_mark(uint8_t *out, uint32_t number)
{
    out[0] = SECTION_COMMAND;
    put_be16(out + 1, COMMAND_PING);
    put_be16(out + 3, WIRE_PING_LENGTH - COMMAND_HEAD);
    wire_put_be32(out + COMMAND_HEAD, WIRE_MARK | (number & WIRE_MARK_BITS));
    return WIRE_PING_LENGTH;
}

size_t wire_put_part_head(uint8_t *out, uint32_t section_id)
{
    out[0] = SECTION_PART;
    wire_put_be32(out + 1, section_id);
    return WIRE_PART_HEAD;
}

size_t wire_put_part_tail(uint8_t *out, uint32_t section_id)
{
    wire_put_be64(out, RAM_SAVE_FLAG_EOS);
    out[8] = SECTION_FOOTER;
    wire_put_be32(out + 9, section_id);
    return WIRE_PART_TAIL;
}

/* The kinds of record that stand alone, without block and payload. */
static bool stands_alone(uint64_t flags)
{
    return flags == RAM_SAVE_FLAG_EOS || flags == RAM_SAVE_FLAG_MULTIFD_FLUSH;
}

static bool is_page(uint64_t flags)
{
    flags &= ~RAM_SAVE_FLAG_CONTINUE;
    return flags == RAM_SAVE_FLAG_PAGE || flags == RAM_SAVE_FLAG_ZERO;
}

/* What the flags of a record that nobody here takes mean, and the way out. */
static const char *refusal(uint64_t flags)
{
    if (flags & RAM_SAVE_FLAG_XBZRLE) {
        return "RAM record with flags of an XBZRLE page: switch capability "
               "xbzrle off at the source";
    }
    if (flags & RAM_SAVE_FLAG_COMPRESS_PAGE) {
        return "RAM record with flags of a compressed page: switch "
               "capability compress off at the source";
    }
    return "RAM record with flags that are not allowed here";
}

enum wire_status wire_get_record_untrusted(const uint8_t *in, size_t size,
                                           struct ram *ram,
                                           struct ram_block **last,
                                           struct wire_record *out,
                                           const char **why)
{
    struct ram_block *block = *last;
    uint64_t word;
    size_t n = 8;

    if (size < n) {
        return WIRE_MORE;
    }
    word = wire_get_be64(in);
    *out = (struct wire_record){ .flags = word & RAM_SAVE_FLAG_MASK,
                                 .offset = word & ~RAM_SAVE_FLAG_MASK,
                                 .length = n };
    if (stands_alone(out->flags)) {
        return WIRE_OK;
    }
    if (!is_page(out->flags)) {
        *why = refusal(out->flags);
        return WIRE_BAD;
    }
    if (!(out->flags & RAM_SAVE_FLAG_CONTINUE)) {
        if (size < n + 1 || size < n + 1 + in[n]) {
            return WIRE_MORE;
        }
        block = ram_find(ram, in + n + 1, in[n]);
        n += 1 + (size_t)in[n];
        if (!block) {
            *why = "RAM record for a block that this guest does not have";
            return WIRE_BAD;
        }
    } else if (!block) {
        *why = "first RAM record of a channel does not name its block";
        return WIRE_BAD;
    }
    if (out->offset >= block->length) {
        *why = "RAM record past the end of its block";
        return WIRE_BAD;
    }
    if (out->flags & RAM_SAVE_FLAG_ZERO) {
        if (size < n + 1) {
            return WIRE_MORE;
        }
        if (in[n++] != 0) {
            *why = "zero page record with a fill byte other than 0";
            return WIRE_BAD;
        }
    }
    out->block = *last = block;
    out->length = n;
    return WIRE_OK;
}
