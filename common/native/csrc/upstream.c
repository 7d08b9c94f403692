#include "upstream.h"

#include "channel.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

static bool is_page_untrusted(const struct ram *ram,
                              const struct upstream_request *request)
{
    uint64_t length = request->length;
    const struct ram_block *b;

    if (request->block >= ram->count) {
        return false;
    }
    b = &ram->blocks[request->block];
    return length >= TARGET_PAGE_SIZE && length <= HOST_PAGE_MAX &&
           !(length & (length - 1)) && request->offset % length == 0 &&
           request->offset < b->length && length <= b->length - request->offset;
}

/* A broken connection is the load loop's to report. */
static void pass_on_untrusted(struct destination *d,
                              const struct upstream_request *request)
{
    const struct ram_block *b;

    if (!is_page_untrusted(d->ram, request)) {
        return;
    }
    b = &d->ram->blocks[request->block];
    if (!bitmap_all_set(&b->received, request->offset >> TARGET_PAGE_BITS,
                        request->length >> TARGET_PAGE_BITS)) {
        (void)rpath_request(&d->rpath, b, request->offset, request->length);
    }
}

struct result upstream_answer(struct destination *d, int fd, int stop_fd)
{
    for (;;) {
        struct upstream_request request;
        struct result r = channel_poll(fd, stop_fd, POLLIN, -1);
        ssize_t size;

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        size = recv(fd, &request, sizeof(request), MSG_DONTWAIT | MSG_TRUNC);
        if (size == sizeof(request)) {
            pass_on_untrusted(d, &request);
        } else if (size < 0 && errno != EAGAIN && errno != EINTR) {
            return result_errno(RESULT_HOST, "requests for pages", errno);
        }
    }
}
