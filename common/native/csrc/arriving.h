/*
 * Stored RAM of which a part is still to come: another daemon fills it.
 *
 * What is here is what that daemon says in the `received` bitmaps it keeps, one
 * bit for each target page, set once the page is in the file and not cleared
 * any more. A host page of which a target page is missing is not here.
 *
 * A page that is asked for and not here is awaited: the request server looks
 * for it every now and then. It also asks that daemon for it, by a datagram to
 * its unix socket. Nothing answers but the bitmap. A datagram that is lost
 * costs time only: as long as a page is awaited it is asked for again, so
 * neither side has to know when the other one comes and goes.
 */
#ifndef POSTCOPY_ARRIVING_H
#define POSTCOPY_ARRIVING_H

#include "ram.h"

#include <sys/un.h>

/* So many threads of a guest, or asynchronous faults, may wait at once. */
#define AWAITED_MAX 16384
/* How often to look for an awaited page. */
#define ARRIVING_LOOK_NS 200000L
/* How often to look for any page, if nobody waits for one. */
#define ARRIVING_LOOK_MS 10

/* A datagram; both ends are on one host. */
struct upstream_request {
    uint32_t block;  /* its place in the stream's list */
    uint32_t length; /* of one host page of the VM, bytes */
    uint64_t offset; /* bytes into the block */
};

struct awaited {
    struct ram_block *block;
    uint64_t host;
    uint64_t since_ns; /* its request was read */
    uint64_t asked_ns; /* it was asked for last; 0: not so far */
};

struct arriving {
    struct ram *ram;
    struct bitmap *received; /* of each block, target pages; read only */
    int fd;                  /* a datagram socket; the caller's */
    struct sockaddr_un filler;
    uint64_t asked; /* atomic: requests that were sent there */
    uint32_t count; /* request server only, as the next */
    struct awaited awaited[AWAITED_MAX];
};

/*
 * `received_fd` is the file of ram_prepare_destination() in the daemon that
 * fills the RAM, `filler` the path of its socket. What was opened is closed by
 * arriving_close() in any case.
 */
struct result arriving_open(struct arriving *a, struct ram *ram,
                            int received_fd, int fd, const char *filler);
void arriving_close(struct arriving *a);

/* Is all of this host page here? Any thread. */
bool arriving_has(const struct arriving *a, const struct ram_block *b,
                  uint64_t host);
/* Of the host pages 64 * word and up, those that are here. Any thread. */
uint64_t arriving_word(const struct arriving *a, const struct ram_block *b,
                       uint64_t word);

/* Await this page from now on; false if too many are awaited. */
bool arriving_await(struct arriving *a, struct ram_block *b, uint64_t host,
                    uint64_t now_ns);
/* An awaited page that is here, and not awaited any more; false if none is. */
bool arriving_take(struct arriving *a, struct awaited *found);
/* Ask for what is awaited, and has not been asked for lately. */
void arriving_ask(struct arriving *a, uint64_t now_ns);
/* Who has asked is gone. No loop may run. */
void arriving_forget(struct arriving *a);

#endif
