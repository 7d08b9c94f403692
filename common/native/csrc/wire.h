/*
 * The three page records that need speed; twin of common/stream/ram.py.
 *
 * A record is a be64 whose low bits are flags and whose high bits are the byte
 * offset in the RAM block, then the block's name (length byte, bytes) unless
 * CONTINUE is set, then the payload: one target page for PAGE, one zero byte
 * for ZERO, nothing for EOS. Source: QEMU docs/devel/migration, RAM section 4.
 */
#ifndef POSTCOPY_WIRE_H
#define POSTCOPY_WIRE_H

#include "ram.h"

#define RAM_SAVE_FLAG_ZERO UINT64_C(0x02)
#define RAM_SAVE_FLAG_MEM_SIZE UINT64_C(0x04)
#define RAM_SAVE_FLAG_PAGE UINT64_C(0x08)
#define RAM_SAVE_FLAG_EOS UINT64_C(0x10)
#define RAM_SAVE_FLAG_CONTINUE UINT64_C(0x20)
#define RAM_SAVE_FLAG_XBZRLE UINT64_C(0x40)
#define RAM_SAVE_FLAG_COMPRESS_PAGE UINT64_C(0x100)
#define RAM_SAVE_FLAG_MULTIFD_FLUSH UINT64_C(0x200)
#define RAM_SAVE_FLAG_MASK (TARGET_PAGE_SIZE - 1)

#define SECTION_PART 0x02
#define SECTION_END 0x03
#define SECTION_FOOTER 0x7e

/* be64, name, and the zero byte of a ZERO record. */
#define WIRE_HEADER_MAX (8 + 1 + IDSTR_MAX + 1)
#define WIRE_PART_HEAD 5           /* type, be32 section id */
#define WIRE_PART_TAIL (8 + 1 + 4) /* EOS, footer, be32 section id */

static inline void wire_put_be32(uint8_t *out, uint32_t value)
{
    value = __builtin_bswap32(value);
    __builtin_memcpy(out, &value, sizeof(value));
}

static inline void wire_put_be64(uint8_t *out, uint64_t value)
{
    value = __builtin_bswap64(value);
    __builtin_memcpy(out, &value, sizeof(value));
}

static inline uint16_t wire_get_be16(const uint8_t *in)
{
    return (uint16_t)(in[0] << 8 | in[1]);
}

static inline uint32_t wire_get_be32(const uint8_t *in)
{
    uint32_t value;

    __builtin_memcpy(&value, in, sizeof(value));
    return __builtin_bswap32(value);
}

static inline uint64_t wire_get_be64(const uint8_t *in)
{
    uint64_t value;

    __builtin_memcpy(&value, in, sizeof(value));
    return __builtin_bswap64(value);
}

/*
 * Write a PAGE or ZERO record without a page's data; returns its length, at
 * most WIRE_HEADER_MAX. `*last` is the channel's CONTINUE state.
 */
size_t wire_put_record(uint8_t *out, const struct ram_block *block,
                       uint64_t offset, bool zero,
                       const struct ram_block **last);

/*
 * RAM_DISCARD: type, be16 command, be16 length; version 0, name, NUL; ranges of
 * be64 start and be64 length. QEMU's source puts at most 12 ranges into one
 * command, its destination takes any number that the length can say.
 */
#define SECTION_COMMAND 0x08
#define COMMAND_HEAD 5 /* type, be16 command, be16 length */
#define COMMAND_PING 2
#define COMMAND_RAM_DISCARD 6
#define DISCARD_RANGES 256
#define WIRE_DISCARD_MAX (COMMAND_HEAD + 3 + IDSTR_MAX + 16 * DISCARD_RANGES)

struct wire_range {
    uint64_t start;
    uint64_t length;
};

size_t wire_put_discard(uint8_t *out, const struct ram_block *block,
                        const struct wire_range *ranges, uint32_t count);

/*
 * PING: the destination answers with a PONG of the same be32. Those of the
 * values from WIRE_MARK on are the marks of flow.h, "PF" and 16 bits.
 */
#define WIRE_PING_LENGTH (COMMAND_HEAD + 4)
#define WIRE_MARK UINT32_C(0x50460000)
#define WIRE_MARK_BITS UINT32_C(0xffff)

size_t wire_put_mark(uint8_t *out, uint32_t number);

static inline bool wire_is_mark(uint32_t ping)
{
    return (ping & ~WIRE_MARK_BITS) == WIRE_MARK;
}

size_t wire_put_part_head(uint8_t *out, uint32_t section_id);
size_t wire_put_part_tail(uint8_t *out, uint32_t section_id);

/* A record's head, decoded. */
struct wire_record {
    uint64_t flags;
    uint64_t offset;
    struct ram_block *block; /* NULL for EOS and MULTIFD_FLUSH */
    size_t length;           /* bytes of the head, payload not counted */
};

enum wire_status { WIRE_OK, WIRE_MORE, WIRE_BAD };

/*
 * Decode one head from `size` bytes that the peer sent. WIRE_MORE: it is cut
 * off. WIRE_BAD: `*why` is a constant text. `*last` is the CONTINUE state and
 * is updated on WIRE_OK only.
 */
enum wire_status wire_get_record_untrusted(const uint8_t *in, size_t size,
                                           struct ram *ram,
                                           struct ram_block **last,
                                           struct wire_record *out,
                                           const char **why);

#endif
