/*
 * A process that has a copy of the guest's area and sends pages of it. It makes
 * the connections, as the source of a migration does, to an address that may be
 * that of a relay; each begins with one byte when the server is ready.
 *
 * On a connection for requests 64-bit offsets come in, and for each of them,
 * in order, the bytes of the page there go out: no head. On a connection for
 * pages, the bytes of the whole range go out after one byte came in.
 */
#ifndef BENCH_PAGE_SERVER_H
#define BENCH_PAGE_SERVER_H

#include "fail.h"

#include <stdint.h>
#include <sys/types.h>

enum page_role {
    PAGE_REQUESTS = 1,
    PAGE_ALL = 2,
};

/* What a connection is for. */
struct page_order {
    uint32_t role;      /* enum page_role */
    uint32_t page_size; /* of requests */
    uint64_t start;     /* offset in the file; a multiple of page_size */
    uint64_t end;
    uint64_t rate; /* PAGE_ALL: bytes per second; 0: no limit */
};

struct page_server {
    pid_t pid;
    int listener; /* where its connections arrive */
    int orders;   /* one for each connection */
};

/*
 * Start it before this process has other threads. It serves `length` bytes of
 * `file`, which may be filled until the first order is given, connects to
 * `host` and `port` and ends with this process. The caller sets `listener`.
 */
bool page_server_start(struct page_server *s, int file, uint64_t length,
                       const char *host, uint16_t port, struct fail *why);

void page_server_stop(struct page_server *s);

/* The end of a new connection, the server being ready; -1 and a sentence. */
int page_server_order(const struct page_server *s,
                      const struct page_order *order, struct fail *why);

#endif
