#include "stored.h"

#include <errno.h>
#include <stdlib.h>

/* Damage is 1 + block << DAMAGE_BITS | region. */
#define DAMAGE_BITS 48

static struct result open_block(struct stored_block *sb,
                                const struct ram_block *b,
                                const uint32_t *checksums)
{
    struct checksum_extent extent = { .fd = b->fd,
                                      .start = b->start,
                                      .length = b->length };
    struct result r = bitmap_open(&sb->left_out, block_hosts(b));

    if (RESULT_IS_OK(r) && checksums) {
        r = checksums_open(&sb->checksums, checksums, &extent);
    }
    return r;
}

struct result stored_open(struct stored *st, struct ram *ram,
                          const uint32_t *checksums)
{
    struct result r = result_ok();

    *st = (struct stored){ .ram = ram, .compared = checksums };
    st->blocks = calloc(ram->count, sizeof(*st->blocks));
    if (!st->blocks) {
        return result_errno(RESULT_HOST, "table of stored RAM", ENOMEM);
    }
    for (uint32_t i = 0; i < ram->count && RESULT_IS_OK(r); i++) {
        r = open_block(&st->blocks[i], &ram->blocks[i], checksums);
        if (checksums) {
            checksums += checksum_regions(ram->blocks[i].length);
        }
    }
    return r;
}

void stored_close(struct stored *st)
{
    if (st->blocks) {
        for (uint32_t i = 0; i < st->ram->count; i++) {
            bitmap_close(&st->blocks[i].left_out);
            checksums_close(&st->blocks[i].checksums);
        }
    }
    free(st->blocks);
    st->blocks = NULL;
}

void stored_restart(struct stored *st)
{
    for (uint32_t i = 0; i < st->ram->count; i++) {
        struct bitmap *left_out = &st->blocks[i].left_out;

        bitmap_clear_range(left_out, 0, left_out->bits);
    }
    st->working_set.first_next = 0;
}

void stored_damaged(struct stored *st, const struct ram_block *b,
                    uint64_t offset)
{
    uint64_t block = (uint64_t)(b - st->ram->blocks);
    uint64_t region = offset >> CHECKSUM_REGION_BITS;

    __atomic_store_n(&st->damage, 1 + (block << DAMAGE_BITS | region),
                     __ATOMIC_RELAXED);
}

struct result stored_check(struct stored *st, const struct ram_block *b,
                           uint64_t offset, uint64_t length)
{
    uint64_t block = (uint64_t)(b - st->ram->blocks);
    struct result r = result_ok();

    if (st->compared) {
        r = checksums_verify(&st->blocks[block].checksums, offset, length);
    }
    if (r.kind == RESULT_HOST) {
        stored_damaged(st, b, r.offset);
    }
    return r;
}

bool stored_damage(const struct stored *st, uint32_t *block, uint64_t *offset)
{
    uint64_t damage = __atomic_load_n(&st->damage, __ATOMIC_RELAXED);

    if (!damage) {
        return false;
    }
    *block = (uint32_t)((damage - 1) >> DAMAGE_BITS);
    *offset = ((damage - 1) & ((UINT64_C(1) << DAMAGE_BITS) - 1))
              << CHECKSUM_REGION_BITS;
    return true;
}

uint64_t stored_verified(const struct stored *st)
{
    uint64_t regions = 0;

    for (uint32_t i = 0; st->blocks && i < st->ram->count; i++) {
        regions += bitmap_count(&st->blocks[i].checksums.verified);
    }
    return regions;
}
