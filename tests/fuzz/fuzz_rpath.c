/*
 * Anything a destination may send on the return path. The first byte of the
 * input chooses whether there is a preempt channel, the rest is the stream.
 */
#include "rpath.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define WITH_PREEMPT 1

#define SECTION 1
#define INPUT_MAX ((size_t)1 << 15) /* fits the socket's buffer */
#define PAGE TARGET_PAGE_SIZE
#define BIG (4 * PAGE)

static struct ram ram;
static int stop_fd;
static int null_fd;

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
    need(RESULT_IS_OK(ram_prepare_source(&ram)));
    stop_fd = eventfd(0, EFD_CLOEXEC);
    null_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
    need(stop_fd >= 0 && null_fd >= 0);
    return 0;
}

/* Every page is owed; all are zero, so that the answers stay small. */
static uint64_t owe_all(struct source *s)
{
    for (uint32_t i = 0; i < ram.count; i++) {
        bitmap_set_range(&ram.blocks[i].owed, 0, ram.blocks[i].owed.bits);
    }
    return source_owed_pages(s);
}

static void run(struct source *s)
{
    struct rp_message message;
    struct result r;

    do {
        r = rpath_run(s, &message);
        need(r.kind != RESULT_OK || message.length <= RP_PAYLOAD_MAX);
    } while (r.kind == RESULT_OK);
    need(r.kind == RESULT_CLOSED || r.kind == RESULT_STREAM);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct channel main_channel;
    struct channel preempt;
    struct source source;
    uint64_t owed;
    int fds[2];

    if (size < 1 || size > INPUT_MAX) {
        return 0;
    }
    need(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    need(RESULT_IS_OK(channel_open(&main_channel, fds[0], stop_fd)));
    need(RESULT_IS_OK(channel_open(&preempt, null_fd, stop_fd)));
    need(RESULT_IS_OK(source_open(&source, &ram, SECTION)));
    source_connect(&source, &main_channel,
                   data[0] & WITH_PREEMPT ? &preempt : &main_channel);
    owed = owe_all(&source);
    need(send(fds[1], data + 1, size - 1, MSG_NOSIGNAL) == (ssize_t)size - 1);
    need(shutdown(fds[1], SHUT_WR) == 0);
    run(&source);
    /* Whatever was asked: a page is sent once, or it is still owed. */
    need(source_owed_pages(&source) + source.stats.urgent_pages == owed);
    source_close(&source);
    channel_close(&main_channel);
    channel_close(&preempt);
    close(fds[0]);
    close(fds[1]);
    return 0;
}
