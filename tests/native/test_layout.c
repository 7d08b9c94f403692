#include "layout.h"

#include "check.h"
#include "support.h"

#include <unistd.h>

#define CHUNKS 6

static const struct block_spec specs[] = {
    /* The last chunk is half a one. */
    { .idstr = "ram", .length = 5 * HUGE + MIB, .page_size = PAGE },
    { .idstr = "rom", .length = 3 * PAGE, .page_size = PAGE },
};

static void fill(struct guest *g, uint64_t first, uint64_t count, uint8_t value)
{
    memset(g->memory[0] + first * PAGE, value, count * PAGE);
}

static void open_guest(struct guest *g)
{
    guest_open(g, specs, 2);
    NEED(RESULT_IS_OK(ram_prepare_source(&g->ram)));
}

static void test_kinds(void)
{
    struct guest g;
    struct ram_block *b;
    uint8_t kinds[CHUNKS];
    uint64_t allocated;

    open_guest(&g);
    b = &g.ram.blocks[0];
    CHECK_EQ(block_chunks(b), CHUNKS);
    fill(&g, 1 * CHUNK_PAGES, CHUNK_PAGES, 1);      /* full */
    fill(&g, 2 * CHUNK_PAGES + 7, 1, 1);            /* one page */
    fill(&g, 3 * CHUNK_PAGES, CHUNK_PAGES, 0);      /* touched, zero */
    fill(&g, 4 * CHUNK_PAGES, CHUNK_PAGES - 64, 1); /* not quite full */
    fill(&g, 5 * CHUNK_PAGES, CHUNK_PAGES / 2, 1);  /* to the block's end */
    allocated = guest_allocated(&g, 0);
    layout_look(b, 0, kinds, CHUNKS);
    CHECK_EQ(kinds[0], CHUNK_EMPTY);
    CHECK_EQ(kinds[1], CHUNK_FULL);
    CHECK_EQ(kinds[2], CHUNK_MIXED);
    CHECK_EQ(kinds[3], CHUNK_MIXED);
    CHECK_EQ(kinds[4], CHUNK_MIXED);
    CHECK_EQ(kinds[5], CHUNK_MIXED);
    /* Looking at a hole must not fill it. */
    CHECK_EQ(guest_allocated(&g, 0), allocated);
    guest_close(&g);
}

static void test_pieces(void)
{
    struct guest g;
    uint8_t whole[CHUNKS];
    uint8_t piece;

    open_guest(&g);
    fill(&g, 2 * CHUNK_PAGES + 5, CHUNK_PAGES, 1);
    layout_look(&g.ram.blocks[0], 0, whole, CHUNKS);
    for (uint64_t i = 0; i < CHUNKS; i++) {
        layout_look(&g.ram.blocks[0], i, &piece, 1);
        CHECK_EQ(piece, whole[i]);
    }
    CHECK_EQ(whole[2], CHUNK_MIXED);
    CHECK_EQ(whole[4], CHUNK_EMPTY);
    guest_close(&g);
}

static void test_small_block(void)
{
    struct guest g;
    uint8_t kind;

    open_guest(&g);
    layout_look(&g.ram.blocks[1], 0, &kind, 1);
    CHECK_EQ(kind, CHUNK_EMPTY);
    g.memory[1][2 * PAGE] = 1;
    layout_look(&g.ram.blocks[1], 0, &kind, 1);
    CHECK_EQ(kind, CHUNK_MIXED);
    guest_close(&g);
}

static void test_skip_empty(void)
{
    static const uint8_t kinds[CHUNKS] = {
        CHUNK_EMPTY, CHUNK_FULL, CHUNK_EMPTY,
        CHUNK_MIXED, CHUNK_FULL, CHUNK_EMPTY
    };
    struct guest g;
    struct ram_block *b;

    open_guest(&g);
    b = &g.ram.blocks[0];
    bitmap_set_range(&b->dirty, 0, b->dirty.bits);
    layout_skip_empty(b, 0, kinds, CHUNKS);
    CHECK_EQ(bitmap_count(&b->dirty), 3 * CHUNK_PAGES);
    CHECK_EQ(bitmap_next_set(&b->dirty, 0), CHUNK_PAGES);
    CHECK_EQ(bitmap_next_clear(&b->dirty, CHUNK_PAGES), 2 * CHUNK_PAGES);
    guest_close(&g);
}

int main(void)
{
    RUN(test_kinds);
    RUN(test_pieces);
    RUN(test_small_block);
    RUN(test_skip_empty);
    return check_status();
}
