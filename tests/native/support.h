/*
 * What several native tests need: guest memory, a channel with a peer, a loop
 * in a thread, and a reader of the stream that shares no code with the library.
 *
 * Fixtures do not fail softly: what they need and do not get ends the program.
 */
#ifndef TESTS_NATIVE_SUPPORT_H
#define TESTS_NATIVE_SUPPORT_H

#include "channel.h"
#include "pace.h"
#include "pump.h"
#include "ram.h"

#include <stdio.h>
#include <stdlib.h>

#define KIB UINT64_C(1024)
#define MIB (KIB * KIB)
#define PAGE TARGET_PAGE_SIZE
#define HUGE (2 * MIB)
#define BLOCKS 4

#define NEED(condition)                                                \
    do {                                                               \
        if (!(condition)) {                                            \
            fprintf(stderr, "%s:%d: needed: %s\n", __FILE__, __LINE__, \
                    #condition);                                       \
            abort();                                                   \
        }                                                              \
    } while (0)

/* --- a guest's memory ---------------------------------------------------- */

struct block_spec {
    const char *idstr;
    uint64_t length;
    uint64_t page_size;
    bool plain; /* an ordinary memfd, whatever page_size says */
};

/* Blocks in memfds, mapped as the guest's process would. */
struct guest {
    struct ram ram;
    uint8_t *memory[BLOCKS];
};

void guest_open(struct guest *g, const struct block_spec *specs,
                uint32_t count);
void guest_close(struct guest *g);
/* Bytes that the kernel holds for a block's file. */
uint64_t guest_allocated(const struct guest *g, uint32_t block);

/* True if 2 MiB pages can be had; lets the kernel find some when asked for. */
bool have_huge_pages(void);

/* A fresh userfaultfd of this process, or -1 if that is not allowed. */
int open_uffd(void);
/* The same, negotiated. */
int open_ready_uffd(void);

/* Of the calling thread, as userfaultfd names it. */
uint32_t thread_id(void);

/*
 * Another process with a block of memory, as seen by a daemon: it was forked
 * off and lives until stranger_kill().
 */
struct stranger {
    int pid;
    int uffd; /* its userfaultfd, negotiated */
    int pagemap;
    int memory; /* the memfd */
    uint64_t base;
    uint64_t length;
};

/* False if this process may not look into another one. */
bool stranger_open(struct stranger *s, uint64_t length);
void stranger_kill(struct stranger *s);
void stranger_close(struct stranger *s);

/* --- contents ------------------------------------------------------------ */

/* A target page whose every word depends on the seed. */
void pattern_fill(void *page, uint64_t seed);
bool pattern_is(const void *page, uint64_t seed);
bool is_all_zero(const void *page);

/* Small, fast and the same in every run. */
uint64_t next_random(uint64_t *state);

/* --- threads ------------------------------------------------------------- */

/* A function that runs in a thread of its own and returns a result. */
struct job {
    pthread_t thread;
    struct result (*run)(void *arg);
    void *arg;
    struct result result;
};

void job_start(struct job *j, struct result (*run)(void *arg), void *arg);
struct result job_wait(struct job *j);

/* --- channels ------------------------------------------------------------ */

/* A channel over a socket pair; `peer` is the other end, and blocks. */
struct line {
    struct channel channel;
    int fd;
    int stop_fd;
    int peer; /* -1 after line_hang_up() */
};

void line_open(struct line *l);
void line_close(struct line *l);
/* The channel's end goes: the peer reads the end of the stream. */
void line_finish(struct line *l);
/* The peer's end goes. */
void line_hang_up(struct line *l);

void make_pair(int fds[2]);
int make_event(void);
void set_event(int fd);
bool is_readable(int fd);

/* All of it, or the program ends. */
void send_all(int fd, const void *data, size_t size);
void receive_all(int fd, void *data, size_t size);

/* --- the stream, read independently -------------------------------------- */

/*
 * Reads one channel of a source to its end and notes what came. Several may
 * share the arrays.
 */
struct walker {
    int fd;
    bool sections;    /* PARTs around the records: the main channel */
    bool whole_hosts; /* postcopy: a huge page's records stand together */
    uint32_t section_id;
    const struct ram *ram;
    uint32_t *counts[BLOCKS]; /* by page: how often it came; atomic */
    uint8_t *images[BLOCKS];  /* what came last */

    uint8_t last; /* 1 + index of the last block, 0: none */
    uint64_t hosts_under_way;
    uint64_t next_offset; /* of the huge page under way */
    uint64_t ends;        /* END sections; nothing may follow one */
    uint64_t records;     /* atomic */
    uint64_t marks;       /* PINGs of the flow control; atomic */
    struct source *asker; /* whose they are, and are answered; NULL: wrong */
};

void walker_open(struct walker *w, int fd, const struct ram *ram,
                 uint32_t section_id);
/* A walker of the preempt channel that notes in the arrays of `w`. */
void walker_share(struct walker *preempt, const struct walker *w, int fd);
void walker_close(struct walker *w);
/* For job_start(); RESULT_OK: the stream ended at a unit's border. */
struct result walker_run(void *walker);

/* --- the stream, written ------------------------------------------------- */

/* Bytes of a stream, put together by hand. */
struct script {
    uint8_t *bytes;
    size_t size;
    size_t room;
};

void script_free(struct script *s);
void put_bytes(struct script *s, const void *data, size_t size);
void put_byte(struct script *s, uint8_t value);
void put_be16(struct script *s, uint16_t value);
void put_be32(struct script *s, uint32_t value);
void put_be64(struct script *s, uint64_t value);
void put_name(struct script *s, const char *idstr);
/* Records; `idstr` NULL: CONTINUE. */
void put_page(struct script *s, const char *idstr, uint64_t offset,
              uint64_t seed);
void put_zero(struct script *s, const char *idstr, uint64_t offset);
void put_section(struct script *s, uint8_t type, uint32_t id);
void put_end_of_section(struct script *s, uint32_t id);

#endif
