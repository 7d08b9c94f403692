/*
 * Anything a source may send to the destination's page loops. The first byte
 * of the input chooses channel and phase, the rest is the stream.
 */
#include "load.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define ON_PREEMPT 1
#define LISTENING 2
#define ADVISED 4

#define SECTION 1
#define INPUT_MAX ((size_t)1 << 18)
#define PAGE TARGET_PAGE_SIZE
#define BIG (4 * PAGE) /* a huge page, small enough to try often */

/* Made once; every input finds it as if it were new. */
static struct ram ram;
static struct destination destination;
static int input_fd;
static int stop_fd;

static void need(bool condition)
{
    if (!condition) {
        abort();
    }
}

static void add_block(const char *idstr, uint64_t length, uint64_t page_size)
{
    int fd = memfd_create(idstr, MFD_CLOEXEC);

    need(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
    need(RESULT_IS_OK(ram_add(&ram, idstr, length, page_size, 0, fd)));
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    need(RESULT_IS_OK(ram_open(&ram, 2)));
    add_block("ram", 16 * PAGE, PAGE);
    add_block("big", 4 * BIG, BIG);
    need(RESULT_IS_OK(ram_prepare_destination(&ram, -1)));
    need(RESULT_IS_OK(
        destination_open(&destination, &ram, PLACE_FILE, -1, NULL, 0)));
    input_fd = memfd_create("input", MFD_CLOEXEC);
    stop_fd = eventfd(0, EFD_CLOEXEC);
    need(input_fd >= 0 && stop_fd >= 0);
    return 0;
}

static void start_over(void)
{
    for (uint32_t i = 0; i < ram.count; i++) {
        struct ram_block *b = &ram.blocks[i];

        bitmap_clear_range(&b->requested, 0, b->requested.bits);
        bitmap_clear_range(&b->claimed, 0, b->claimed.bits);
        bitmap_clear_range(&b->mapped, 0, b->mapped.bits);
    }
    need(RESULT_IS_OK(destination_empty(&destination)));
    destination.listening = 0;
    destination.missing = 0;
    memset(&destination.stats, 0, sizeof(destination.stats));
}

static void set_input(const uint8_t *data, size_t size)
{
    need(ftruncate(input_fd, 0) == 0);
    need(pwrite(input_fd, data, size, 0) == (ssize_t)size);
    need(lseek(input_fd, 0, SEEK_SET) == 0);
}

/* With the loader gone a host page is here or missing, nothing in between. */
static void check_postcopy(void)
{
    uint64_t missing = 0;

    for (uint32_t i = 0; i < ram.count; i++) {
        const struct ram_block *b = &ram.blocks[i];

        for (uint64_t host = 0; host < block_hosts(b); host++) {
            need(place_is_here(b, host) == bitmap_test(&b->claimed, host));
            missing += !place_is_here(b, host);
        }
    }
    need(missing == destination_missing(&destination));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct channel channel;
    struct loader loader;
    struct result r;

    if (size < 1 || size > INPUT_MAX) {
        return 0;
    }
    start_over();
    set_input(data + 1, size - 1);
    need(RESULT_IS_OK(channel_open(&channel, input_fd, stop_fd)));
    need(RESULT_IS_OK(
        loader_open(&loader, &destination, &channel, data[0] & ON_PREEMPT)));
    loader.section_id = SECTION;
    loader.advised = data[0] & ADVISED ? 1 : 0;
    if (data[0] & LISTENING) {
        need(RESULT_IS_OK(destination_listen(&destination)));
    }
    r = data[0] & ON_PREEMPT ? load_preempt(&loader) : load_main(&loader);
    need(r.kind == RESULT_OK || r.kind == RESULT_CLOSED ||
         r.kind == RESULT_STREAM);
    need(channel_position(&channel) <= size - 1);
    loader_close(&loader);
    channel_close(&channel);
    if (data[0] & LISTENING) {
        check_postcopy();
    }
    return 0;
}
