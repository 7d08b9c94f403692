#include "page_server.h"
#include "account.h"
#include "memory.h"
#include "tcp.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define REQUESTS_MAX 64u
#define CHUNK (1u << 20)      /* for each call that sends */
#define SLICES_PER_SECOND 100 /* of a limited rate */

struct connection {
    int fd;
    uint8_t *memory;
    uint64_t length;
    struct page_order order;
};

/* Requests */

static bool answer(const struct connection *c, uint64_t offset,
                   struct fail *why)
{
    const struct page_order *o = &c->order;

    if (offset < o->start || offset >= o->end || offset % o->page_size != 0)
        return fail(why, "a request for %llu, which is no page",
                    (unsigned long long)offset);
    return tcp_send_bytes(c->fd, c->memory + offset, o->page_size, why);
}

/* A piece of a request waits in `requests` for the rest of it. */
static bool serve_requests(const struct connection *c, struct fail *why)
{
    uint64_t requests[REQUESTS_MAX];
    size_t used = 0;

    for (;;) {
        ssize_t n =
            recv(c->fd, (char *)requests + used, sizeof(requests) - used, 0);
        size_t whole;

        if (n <= 0)
            return n == 0 || fail(why, "cannot receive: %s", strerror(errno));
        used += (size_t)n;
        whole = used / sizeof(requests[0]);
        for (size_t i = 0; i < whole; i++) {
            if (!answer(c, requests[i], why))
                return false;
        }
        used %= sizeof(requests[0]);
        memcpy(requests, requests + whole, used);
    }
}

/* All pages */

static void sleep_until(double when)
{
    double left = when - clock_seconds();
    struct timespec t;

    if (left <= 0)
        return;
    t.tv_sec = (time_t)left;
    t.tv_nsec = (long)((left - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

static uint64_t chunk_of(const struct page_order *o)
{
    uint64_t slice = o->rate / SLICES_PER_SECOND + 1;

    return o->rate && slice < CHUNK ? slice : CHUNK;
}

static bool serve_all(const struct connection *c, struct fail *why)
{
    const struct page_order *o = &c->order;
    double start;
    char go;

    if (!tcp_receive_bytes(c->fd, &go, sizeof(go), why))
        return false;
    start = clock_seconds();
    for (uint64_t at = o->start; at < o->end;) {
        uint64_t left = o->end - at, chunk = chunk_of(o);
        uint64_t n = left < chunk ? left : chunk;

        if (!tcp_send_bytes(c->fd, c->memory + at, n, why))
            return false;
        at += n;
        if (o->rate)
            sleep_until(start + (double)(at - o->start) / (double)o->rate);
    }
    return true;
}

/* Connections */

static bool is_sane(const struct connection *c)
{
    const struct page_order *o = &c->order;

    return (o->role == PAGE_REQUESTS || o->role == PAGE_ALL) &&
           (o->page_size == SMALL_PAGE || o->page_size == HUGE_PAGE) &&
           o->start < o->end && o->end <= c->length &&
           o->start % o->page_size == 0 && o->end % o->page_size == 0;
}

static bool serve(const struct connection *c, struct fail *why)
{
    const struct page_order *o = &c->order;

    /* Its own page faults are no part of what is measured. */
    madvise(c->memory + o->start, o->end - o->start, MADV_POPULATE_READ);
    if (!tcp_send_bytes(c->fd, "", 1, why))
        return false;
    return o->role == PAGE_ALL ? serve_all(c, why) : serve_requests(c, why);
}

/*
 * What was sent stays readable for the peer; it closes the connection by
 * ending the process.
 */
static void *connection_main(void *argument)
{
    struct connection *c = argument;
    struct fail why;

    if (!serve(c, &why))
        fprintf(stderr, "limit_fault: page server: %s\n", why.text);
    shutdown(c->fd, SHUT_WR);
    free(c);
    return NULL;
}

static bool start_connection(const struct connection *given, struct fail *why)
{
    struct connection *c = malloc(sizeof(*c));
    pthread_t thread;

    if (!c)
        return fail(why, "no memory for a connection");
    *c = *given;
    if (pthread_create(&thread, NULL, connection_main, c) != 0) {
        free(c);
        return fail(why, "cannot start a thread");
    }
    pthread_detach(thread);
    return true;
}

static bool next_order(int orders, struct page_order *order, struct fail *why)
{
    ssize_t n = read(orders, order, sizeof(*order));

    return n == sizeof(*order) || fail(why, "no more orders");
}

static bool follow_orders(struct connection *c, int orders, const char *host,
                          uint16_t port, struct fail *why)
{
    while (next_order(orders, &c->order, why)) {
        if (!is_sane(c))
            return fail(why, "an order that makes no sense");
        c->fd = tcp_connect(host, port, why);
        if (c->fd < 0 || !start_connection(c, why))
            return false;
    }
    return false;
}

static void server_main(int orders, int file, uint64_t length, const char *host,
                        uint16_t port)
{
    struct connection c = { .length = length };
    struct fail why;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    c.memory = memory_map(file, length, &why);
    if (c.memory)
        follow_orders(&c, orders, host, port, &why);
    fprintf(stderr, "limit_fault: page server: %s\n", why.text);
    _exit(1);
}

bool page_server_start(struct page_server *s, int file, uint64_t length,
                       const char *host, uint16_t port, struct fail *why)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0)
        return fail(why, "no pipe: %s", strerror(errno));
    s->orders = ends[1];
    s->pid = fork();
    if (s->pid == 0)
        server_main(ends[0], file, length, host, port);
    close(ends[0]);
    return s->pid > 0 ||
           fail(why, "cannot start the page server: %s", strerror(errno));
}

/* The caller's side */

void page_server_stop(struct page_server *s)
{
    if (s->pid > 0 && kill(s->pid, SIGKILL) == 0)
        waitpid(s->pid, NULL, 0);
}

int page_server_order(const struct page_server *s,
                      const struct page_order *order, struct fail *why)
{
    char ready;
    int fd;

    if (write(s->orders, order, sizeof(*order)) != sizeof(*order)) {
        fail(why, "the page server is gone: %s", strerror(errno));
        return -1;
    }
    fd = tcp_accept(s->listener, why);
    if (fd < 0 || tcp_receive_bytes(fd, &ready, sizeof(ready), why))
        return fd;
    close(fd);
    return -1;
}
