#include "ram.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

static int make_file(uint64_t length)
{
    int fd = memfd_create("ram", MFD_CLOEXEC);

    NEED(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
    return fd;
}

static void test_capacity(void)
{
    struct ram ram;
    int fd = make_file(PAGE);

    CHECK_EQ(ram_open(&ram, 0).err, EINVAL);
    CHECK_EQ(ram_open(&ram, RAM_BLOCKS_MAX + 1).err, EINVAL);
    ram_close(&ram);
    CHECK(RESULT_IS_OK(ram_open(&ram, RAM_BLOCKS_MAX)));
    ram_close(&ram);
    CHECK(RESULT_IS_OK(ram_open(&ram, 1)));
    CHECK(RESULT_IS_OK(ram_add(&ram, "a", PAGE, PAGE, 0, fd)));
    CHECK_EQ(ram_add(&ram, "b", PAGE, PAGE, 0, fd).err, ENOSPC);
    CHECK_EQ(ram.total, PAGE);
    ram_close(&ram);
    close(fd);
}

static void test_refusals(void)
{
    struct ram ram;
    int fd = make_file(8 * MIB);
    char name[IDSTR_MAX + 2];

    memset(name, 'x', sizeof(name));
    name[IDSTR_MAX + 1] = 0;
    CHECK(RESULT_IS_OK(ram_open(&ram, 4)));
    CHECK_EQ(ram_add(&ram, "", PAGE, PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, name, PAGE, PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", 0, PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", PAGE + 1, PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", 6144, 2048, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", 3 * PAGE, 3 * PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", 3 * MIB, HUGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", 0, 0, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", 8 * MIB + PAGE, PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", UINT64_C(1) << 63, PAGE, 0, fd).err, EINVAL);
    CHECK_EQ(ram_add(&ram, "a", PAGE, PAGE, 0, -1).err, EBADF);
    /* A host page is one batch of the pump at most. */
    CHECK_EQ(ram_add(&ram, "a", 4 * MIB, 4 * MIB, 0, fd).err, EINVAL);
    CHECK_EQ(ram.count, 0);
    name[IDSTR_MAX] = 0;
    CHECK(RESULT_IS_OK(ram_add(&ram, name, 8 * MIB, HUGE, 0, fd)));
    CHECK_EQ(ram_add(&ram, name, PAGE, PAGE, 0, fd).err, EEXIST);
    ram_close(&ram);
    close(fd);
}

static void test_find(void)
{
    struct ram ram;
    int fd = make_file(MIB);

    CHECK(RESULT_IS_OK(ram_open(&ram, 3)));
    CHECK(RESULT_IS_OK(ram_add(&ram, "ram", MIB, PAGE, 0x100000, fd)));
    CHECK(RESULT_IS_OK(ram_add(&ram, "rom", PAGE, PAGE, 0x200000, fd)));
    CHECK(RESULT_IS_OK(ram_add(&ram, "none", PAGE, PAGE, 0, fd)));
    CHECK(ram_find(&ram, "rome", 3) == &ram.blocks[1]);
    CHECK(!ram_find(&ram, "rome", 4));
    CHECK(!ram_find(&ram, "", 0));
    CHECK(!ram_at(&ram, 0));
    CHECK(!ram_at(&ram, 0xfffff));
    CHECK(ram_at(&ram, 0x100000) == &ram.blocks[0]);
    CHECK(ram_at(&ram, 0x1fffff) == &ram.blocks[0]);
    CHECK(ram_at(&ram, 0x200fff) == &ram.blocks[1]);
    CHECK(!ram_at(&ram, 0x201000));
    ram_close(&ram);
    close(fd);
}

static void test_prepare(void)
{
    static const struct block_spec specs[] = {
        { .idstr = "small", .length = 8 * MIB, .page_size = PAGE },
        { .idstr = "huge",
          .length = 8 * MIB,
          .page_size = HUGE,
          .plain = true },
    };
    struct guest g;

    guest_open(&g, specs, 2);
    CHECK(RESULT_IS_OK(ram_prepare_source(&g.ram)));
    g.memory[0][5] = 7;
    CHECK_EQ(g.ram.blocks[0].map[5], 7);
    CHECK_EQ(g.ram.blocks[0].dirty.bits, 2048);
    CHECK_EQ(g.ram.blocks[0].owed.bits, 2048);
    CHECK_EQ(g.ram.blocks[1].dirty.bits, 2048);
    CHECK_EQ(g.ram.blocks[1].owed.bits, 4);
    guest_close(&g);

    guest_open(&g, specs, 2);
    CHECK(RESULT_IS_OK(ram_prepare_destination(&g.ram, -1)));
    CHECK_EQ((uintptr_t)g.ram.blocks[0].map % CHUNK_SIZE, 0);
    CHECK_EQ(g.ram.blocks[0].prepared.bits, 4);
    g.ram.blocks[1].map[5] = 7;
    CHECK_EQ(g.memory[1][5], 7);
    CHECK_EQ(g.ram.blocks[1].received.bits, 2048);
    CHECK_EQ(g.ram.blocks[1].claimed.bits, 4);
    guest_close(&g);
}

static void test_geometry(void)
{
    struct ram_block b = { .length = 8 * MIB,
                           .page_size = HUGE,
                           .host_bits = 21 };

    CHECK_EQ(block_pages(&b), 2048);
    CHECK_EQ(block_hosts(&b), 4);
    CHECK_EQ(block_pages_bits(&b), 9);
    CHECK_EQ(block_pages_per_host(&b), 512);
    CHECK(block_is_huge(&b));
}

int main(void)
{
    RUN(test_capacity);
    RUN(test_refusals);
    RUN(test_find);
    RUN(test_prepare);
    RUN(test_geometry);
    return check_status();
}
