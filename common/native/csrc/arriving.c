#include "arriving.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

/* Until a page is asked for again: a request may be lost on its way. */
#define AGAIN_NS UINT64_C(500000000)
#define WORD_BITS 64

/*
 * As ram_prepare_destination() lays it out where nobody runs on the RAM: there
 * every host page is one target page, and both bitmaps have the same length.
 */
static uint64_t kept_length(const struct ram_block *b)
{
    return 2 * bitmap_length(block_pages(b));
}

static struct result check_length(const struct ram *ram, int received_fd)
{
    uint64_t length = 0;
    struct stat st;

    for (uint32_t i = 0; i < ram->count; i++) {
        length += kept_length(&ram->blocks[i]);
    }
    if (fstat(received_fd, &st) < 0) {
        return result_errno(RESULT_HOST, "fstat of what has arrived", errno);
    }
    return (uint64_t)st.st_size == length ?
               result_ok() :
               result_errno(RESULT_HOST, "length of what has arrived", EINVAL);
}

static struct result set_filler(struct arriving *a, const char *filler)
{
    if (strlen(filler) >= sizeof(a->filler.sun_path)) {
        return result_errno(RESULT_HOST, "path of a socket", ENAMETOOLONG);
    }
    a->filler.sun_family = AF_UNIX;
    strcpy(a->filler.sun_path, filler);
    return result_ok();
}

struct result arriving_open(struct arriving *a, struct ram *ram,
                            int received_fd, int fd, const char *filler)
{
    struct result r = check_length(ram, received_fd);
    uint64_t offset = 0;

    *a = (struct arriving){ .ram = ram, .fd = fd };
    if (RESULT_IS_OK(r)) {
        r = set_filler(a, filler);
    }
    a->received = calloc(ram->count, sizeof(*a->received));
    if (!a->received) {
        return result_errno(RESULT_HOST, "table of arriving RAM", ENOMEM);
    }
    for (uint32_t i = 0; i < ram->count && RESULT_IS_OK(r); i++) {
        const struct ram_block *b = &ram->blocks[i];

        r = bitmap_view_file(&a->received[i], block_pages(b), received_fd,
                             offset);
        offset += kept_length(b);
    }
    return r;
}

void arriving_close(struct arriving *a)
{
    if (a->received) {
        for (uint32_t i = 0; i < a->ram->count; i++) {
            bitmap_close(&a->received[i]);
        }
    }
    free(a->received);
    a->received = NULL;
}

static const struct bitmap *received_of(const struct arriving *a,
                                        const struct ram_block *b)
{
    return &a->received[b - a->ram->blocks];
}

bool arriving_has(const struct arriving *a, const struct ram_block *b,
                  uint64_t host)
{
    return bitmap_all_set(received_of(a, b), host << block_pages_bits(b),
                          block_pages_per_host(b));
}

uint64_t arriving_word(const struct arriving *a, const struct ram_block *b,
                       uint64_t word)
{
    uint64_t first = word * WORD_BITS;
    uint64_t here = 0;

    if (!block_is_huge(b)) {
        return __atomic_load_n(&received_of(a, b)->words[word],
                               __ATOMIC_SEQ_CST);
    }
    for (uint64_t i = 0; i < WORD_BITS && first + i < block_hosts(b); i++) {
        here |= (uint64_t)arriving_has(a, b, first + i) << i;
    }
    return here;
}

static bool is_awaited(const struct arriving *a, const struct ram_block *b,
                       uint64_t host)
{
    for (uint32_t i = 0; i < a->count; i++) {
        if (a->awaited[i].block == b && a->awaited[i].host == host) {
            return true;
        }
    }
    return false;
}

bool arriving_await(struct arriving *a, struct ram_block *b, uint64_t host,
                    uint64_t now_ns)
{
    if (is_awaited(a, b, host)) {
        return true;
    }
    if (a->count == AWAITED_MAX) {
        return false;
    }
    a->awaited[a->count++] =
        (struct awaited){ .block = b, .host = host, .since_ns = now_ns };
    return true;
}

bool arriving_take(struct arriving *a, struct awaited *found)
{
    for (uint32_t i = 0; i < a->count; i++) {
        if (arriving_has(a, a->awaited[i].block, a->awaited[i].host)) {
            *found = a->awaited[i];
            a->awaited[i] = a->awaited[--a->count];
            return true;
        }
    }
    return false;
}

static bool send_request(const struct arriving *a,
                         const struct upstream_request *request)
{
    return sendto(a->fd, request, sizeof(*request), MSG_DONTWAIT | MSG_NOSIGNAL,
                  (const struct sockaddr *)&a->filler,
                  sizeof(a->filler)) == sizeof(*request);
}

static bool ask(struct arriving *a, const struct awaited *page)
{
    struct upstream_request request = {
        .block = (uint32_t)(page->block - a->ram->blocks),
        .length = (uint32_t)page->block->page_size,
        .offset = page->host << page->block->host_bits,
    };

    if (!send_request(a, &request)) {
        return false;
    }
    __atomic_fetch_add(&a->asked, 1, __ATOMIC_RELAXED);
    return true;
}

void arriving_ask(struct arriving *a, uint64_t now_ns)
{
    for (uint32_t i = 0; i < a->count; i++) {
        struct awaited *page = &a->awaited[i];

        if (page->asked_ns && now_ns - page->asked_ns < AGAIN_NS) {
            continue;
        }
        if (!ask(a, page)) {
            return; /* its buffer is full, or nobody is there */
        }
        page->asked_ns = now_ns;
    }
}

void arriving_forget(struct arriving *a)
{
    a->count = 0;
}
