#include "zero.h"

#include "check.h"
#include "support.h"

/* No byte of the page goes unseen. */
static void test_every_byte(void)
{
    _Alignas(4096) static uint8_t page[PAGE];

    CHECK(page_is_zero(page));
    for (size_t i = 0; i < PAGE; i++) {
        page[i] = 1;
        CHECK(!page_is_zero(page));
        page[i] = 0x80;
        CHECK(!page_is_zero(page));
        page[i] = 0;
    }
    CHECK(page_is_zero(page));
}

/* And none outside of it counts. */
static void test_neighbours(void)
{
    _Alignas(4096) static uint8_t pages[3 * PAGE];

    memset(pages, 0xff, sizeof(pages));
    memset(pages + PAGE, 0, PAGE);
    CHECK(page_is_zero(pages + PAGE));
    CHECK(!page_is_zero(pages));
    CHECK(!page_is_zero(pages + 2 * PAGE));
}

int main(void)
{
    RUN(test_every_byte);
    RUN(test_neighbours);
    return check_status();
}
