/*
 * Both sides wired together in one process: a guest that writes while it is
 * copied, the switch, and the same guest running on at the other end while its
 * pages come; with a connection that breaks on the way, if wanted.
 */
#include "dirty.h"
#include "fault.h"
#include "load.h"
#include "rpath.h"
#include "uffd.h"

#include "check.h"
#include "support.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECTION 1
#define THREADS 3
#define SHUT 1

enum { SOURCE, DESTINATION };

struct layout {
    struct block_spec source[2];
    struct block_spec destination[2];
};

static const struct layout small = {
    { { .idstr = "ram", .length = 8 * MIB, .page_size = PAGE },
      { .idstr = "vga", .length = 100 * PAGE, .page_size = PAGE } },
    { { .idstr = "ram", .length = 8 * MIB, .page_size = PAGE },
      { .idstr = "vga", .length = 100 * PAGE, .page_size = PAGE } },
};

static const struct layout huge = {
    { { .idstr = "ram", .length = 8 * HUGE, .page_size = HUGE, .plain = true },
      { .idstr = "vga", .length = 100 * PAGE, .page_size = PAGE } },
    { { .idstr = "ram", .length = 8 * HUGE, .page_size = HUGE },
      { .idstr = "vga", .length = 100 * PAGE, .page_size = PAGE } },
};

/* A connection, a channel at each end. */
struct joint {
    int fds[2];
    int stops[2];
    struct channel ends[2];
};

static void joint_open(struct joint *j)
{
    make_pair(j->fds);
    for (int i = 0; i < 2; i++) {
        j->stops[i] = make_event();
        NEED(RESULT_IS_OK(channel_open(&j->ends[i], j->fds[i], j->stops[i])));
    }
}

static void joint_close(struct joint *j)
{
    for (int i = 0; i < 2; i++) {
        channel_close(&j->ends[i]);
        close(j->fds[i]);
        close(j->stops[i]);
    }
}

struct world {
    bool two_channels;
    struct guest guests[2];
    int uffds[2];
    int fault_stop;

    struct source source;
    struct dirty dirty;
    struct destination destination;

    struct joint main;
    struct joint preempt;
    struct loader loader;
    struct loader urgent;

    struct job faults;
    struct job sweep;
    struct job pump; /* of one epoch, as the next three */
    struct job server;
    struct job load;
    struct job load_urgent;
};

/* --- the guest ----------------------------------------------------------- */

struct vcpu {
    struct world *w;
    uint64_t index;
    struct job job;
    uint32_t stop;   /* atomic */
    uint64_t writes; /* atomic */
    uint64_t wrong;
};

static uint64_t *words_of(struct world *w, int side, uint32_t i, uint64_t page)
{
    return (uint64_t *)(void *)(w->guests[side].memory[i] + page * PAGE);
}

static struct ram_block *block(struct world *w, int side, uint32_t i)
{
    return &w->guests[side].ram.blocks[i];
}

/* At the source: each thread counts in a word of its own, all over the RAM. */
static struct result write_on(void *arg)
{
    struct vcpu *v = arg;
    uint64_t random = v->index;

    while (!__atomic_load_n(&v->stop, __ATOMIC_SEQ_CST)) {
        uint32_t i = next_random(&random) % 8 == 0;
        uint64_t pages = block_pages(block(v->w, SOURCE, i));
        /* A third of the RAM is never touched. */
        uint64_t page =
            next_random(&random) % pages / 3 * 3 + next_random(&random) % 2;

        if (page < pages) {
            __atomic_fetch_add(&words_of(v->w, SOURCE, i, page)[v->index], 1,
                               __ATOMIC_RELAXED);
            __atomic_fetch_add(&v->writes, 1, __ATOMIC_RELAXED);
        }
    }
    return result_ok();
}

/*
 * At the destination: visit every page in an order of one's own, check it
 * against the source's, and count once more. Word `index` is the thread's own,
 * the word THREADS is read by all and written by none.
 */
static struct result visit_all(void *arg)
{
    struct vcpu *v = arg;

    for (uint32_t i = 0; i < 2; i++) {
        uint64_t pages = block_pages(block(v->w, DESTINATION, i));
        uint64_t page = v->index * pages / THREADS;

        for (uint64_t n = 0; n < pages; n++, page = (page + 1031) % pages) {
            uint64_t *here = words_of(v->w, DESTINATION, i, page);
            uint64_t *there = words_of(v->w, SOURCE, i, page);

            v->wrong += here[v->index] != there[v->index];
            v->wrong += here[THREADS] != there[THREADS];
            here[v->index]++;
        }
    }
    return result_ok();
}

static void fill_source(struct world *w)
{
    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(w, SOURCE, i)); p += 3) {
            pattern_fill(words_of(w, SOURCE, i, p), (uint64_t)i << 32 | p);
        }
    }
}

/* --- set up -------------------------------------------------------------- */

static void world_open(struct world *w, const struct layout *layout, int way,
                       bool two_channels)
{
    memset(w, 0, sizeof(*w));
    w->two_channels = two_channels;
    guest_open(&w->guests[SOURCE], layout->source, 2);
    guest_open(&w->guests[DESTINATION], layout->destination, 2);
    fill_source(w);
    for (int i = 0; i < 2; i++) {
        w->uffds[i] = open_ready_uffd();
    }
    w->fault_stop = make_event();
    NEED(RESULT_IS_OK(ram_prepare_source(&w->guests[SOURCE].ram)));
    NEED(
        RESULT_IS_OK(ram_prepare_destination(&w->guests[DESTINATION].ram, -1)));
    NEED(
        RESULT_IS_OK(source_open(&w->source, &w->guests[SOURCE].ram, SECTION)));
    w->dirty = (struct dirty){ .ram = &w->guests[SOURCE].ram,
                               .way = DIRTY_WP_ASYNC,
                               .uffd = w->uffds[SOURCE] };
    w->dirty.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    NEED(RESULT_IS_OK(destination_open(&w->destination,
                                       &w->guests[DESTINATION].ram, way,
                                       w->uffds[DESTINATION], NULL, 0)));
}

static void connect_both(struct world *w)
{
    joint_open(&w->main);
    joint_open(&w->preempt);
    source_connect(&w->source, &w->main.ends[SOURCE],
                   w->two_channels ? &w->preempt.ends[SOURCE] :
                                     &w->main.ends[SOURCE]);
    NEED(RESULT_IS_OK(loader_open(&w->loader, &w->destination,
                                  &w->main.ends[DESTINATION], false)));
    NEED(RESULT_IS_OK(loader_open(&w->urgent, &w->destination,
                                  &w->preempt.ends[DESTINATION], true)));
    w->loader.section_id = SECTION;
    w->loader.advised = 1;
    rpath_connect(&w->destination.rpath, &w->main.ends[DESTINATION]);
}

static void disconnect_both(struct world *w)
{
    rpath_connect(&w->destination.rpath, NULL);
    loader_close(&w->loader);
    loader_close(&w->urgent);
    joint_close(&w->main);
    joint_close(&w->preempt);
}

static void world_close(struct world *w)
{
    destination_close(&w->destination);
    source_close(&w->source);
    close(w->dirty.pagemap);
    close(w->fault_stop);
    for (int i = 0; i < 2; i++) {
        close(w->uffds[i]);
        guest_close(&w->guests[i]);
    }
}

/* --- the loops ----------------------------------------------------------- */

static struct result run_pump(void *arg)
{
    return pump_postcopy(&((struct world *)arg)->source);
}

static struct result run_server(void *arg)
{
    struct rp_message m;

    return rpath_run(&((struct world *)arg)->source, &m);
}

static struct result run_load(void *arg)
{
    return load_main(&((struct world *)arg)->loader);
}

static struct result run_load_urgent(void *arg)
{
    return load_preempt(&((struct world *)arg)->urgent);
}

static struct result run_faults(void *arg)
{
    struct world *w = arg;

    return fault_run(&w->destination, w->fault_stop);
}

static struct result run_sweep(void *arg)
{
    struct world *w = arg;

    return place_sweep(&w->destination, w->fault_stop);
}

static void start_epoch(struct world *w)
{
    job_start(&w->server, run_server, w);
    job_start(&w->load, run_load, w);
    job_start(&w->load_urgent, run_load_urgent, w);
    job_start(&w->pump, run_pump, w);
}

/* --- the phases ---------------------------------------------------------- */

/* A byte that is no RAM hands the stream back on the other side. */
static bool pass_border(struct world *w)
{
    uint8_t byte;

    return RESULT_IS_OK(channel_write(&w->main.ends[SOURCE], "", 1)) &&
           RESULT_IS_OK(job_wait(&w->load)) && w->loader.next == 0 &&
           RESULT_IS_OK(channel_read(&w->main.ends[DESTINATION], &byte, 1));
}

/* A few rounds while the guest writes; the rest of its writes is owed. */
static bool precopy(struct world *w)
{
    struct vcpu vcpus[THREADS];
    uint64_t pages = 0;
    uint64_t before;
    bool ok = RESULT_IS_OK(dirty_start(&w->dirty));

    job_start(&w->load, run_load, w);
    for (uint64_t i = 0; i < THREADS; i++) {
        vcpus[i] = (struct vcpu){ .w = w, .index = i };
        job_start(&vcpus[i].job, write_on, &vcpus[i]);
    }
    for (int round = 0; ok && round < 3; round++) {
        ok = RESULT_IS_OK(pump_precopy(&w->source)) &&
             RESULT_IS_OK(dirty_sync(&w->dirty, &pages));
    }
    /* Enough is owed that the guest will ask for some of it. */
    before = __atomic_load_n(&vcpus[0].writes, __ATOMIC_RELAXED);
    while (__atomic_load_n(&vcpus[0].writes, __ATOMIC_RELAXED) <
           before + 2000) {
    }
    for (uint64_t i = 0; i < THREADS; i++) {
        __atomic_store_n(&vcpus[i].stop, 1, __ATOMIC_SEQ_CST);
        job_wait(&vcpus[i].job);
    }
    return ok && RESULT_IS_OK(dirty_sync(&w->dirty, &pages)) &&
           RESULT_IS_OK(dirty_stop(&w->dirty)) &&
           source_owe_dirty(&w->source) > 0 &&
           RESULT_IS_OK(pump_discards(&w->source)) && pass_border(w) &&
           w->loader.discards > 0;
}

/* The connection breaks in the middle of it. */
static void break_off(struct world *w)
{
    uint64_t before = STATS_READ(w->destination.stats.postcopy_pages);

    while (STATS_READ(w->destination.stats.postcopy_pages) < before + 50 &&
           destination_missing(&w->destination)) {
    }
    shutdown(w->main.fds[SOURCE], SHUT_RDWR);
    shutdown(w->preempt.fds[SOURCE], SHUT_RDWR);
    set_event(w->main.stops[SOURCE]);
    set_event(w->main.stops[DESTINATION]);
    set_event(w->preempt.stops[SOURCE]);
    job_wait(&w->pump);
    job_wait(&w->server);
    job_wait(&w->load);
    job_wait(&w->load_urgent);
    disconnect_both(w);
}

/* The source owes what the destination has not; that asks for it again. */
static bool recover(struct world *w)
{
    bool ok = RESULT_IS_OK(destination_begin_epoch(&w->destination));

    for (uint32_t i = 0; i < 2; i++) {
        const struct ram_block *here = block(w, DESTINATION, i);

        /* What the wire carries: words as they are, of a little-endian host. */
        source_owe_missing(block(w, SOURCE, i),
                           (const uint8_t *)here->received.words);
    }
    connect_both(w);
    return ok && RESULT_IS_OK(fault_ask_again(&w->destination));
}

static bool send_end(struct world *w)
{
    struct script s = { 0 };
    struct result r;

    put_section(&s, 3, SECTION);
    put_end_of_section(&s, SECTION);
    r = channel_write(&w->main.ends[SOURCE], s.bytes, s.size);
    script_free(&s);
    return RESULT_IS_OK(r);
}

/* As the two daemons end it: END, EOF; all is here; preempt down; SHUT. */
static bool end(struct world *w)
{
    static const uint8_t shut[] = { 0, SHUT, 0, 4, 0, 0, 0, 0 };
    struct pollfd complete = { .fd = w->destination.complete_fd,
                               .events = POLLIN };
    bool ok = RESULT_IS_OK(job_wait(&w->pump)) && send_end(w);

    __atomic_store_n(&w->source.ended, 1, __ATOMIC_SEQ_CST);
    ok = ok && pass_border(w) && w->loader.ended && poll(&complete, 1, -1) == 1;
    shutdown(w->preempt.fds[DESTINATION], SHUT_RDWR);
    ok = ok && job_wait(&w->load_urgent).kind == RESULT_CLOSED &&
         RESULT_IS_OK(
             channel_write(&w->main.ends[DESTINATION], shut, sizeof(shut)));
    return ok && RESULT_IS_OK(job_wait(&w->server));
}

static bool stop_faults(struct world *w)
{
    struct result r;

    job_wait(&w->sweep);
    set_event(w->fault_stop);
    r = job_wait(&w->faults);
    return r.kind == RESULT_STOPPED &&
           RESULT_IS_OK(destination_finish(&w->destination));
}

/* The source's RAM, and one more in each thread's word. */
static bool same_contents(struct world *w)
{
    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(w, SOURCE, i)); p++) {
            uint64_t *here = words_of(w, DESTINATION, i, p);

            for (uint64_t t = 0; t < THREADS; t++) {
                here[t]--;
            }
            if (memcmp(here, words_of(w, SOURCE, i, p), PAGE) != 0) {
                fprintf(stderr, "block %u page %lu differs\n", i,
                        (unsigned long)p);
                return false;
            }
        }
    }
    return true;
}

static void migrate(const struct layout *layout, int way, bool two_channels,
                    int breaks)
{
    static struct world w;
    struct vcpu vcpus[THREADS];

    world_open(&w, layout, way, two_channels);
    connect_both(&w);
    CHECK(precopy(&w));
    CHECK(RESULT_IS_OK(destination_listen(&w.destination)));
    CHECK_EQ(destination_missing(&w.destination),
             bitmap_count(&block(&w, SOURCE, 0)->owed) +
                 bitmap_count(&block(&w, SOURCE, 1)->owed));
    job_start(&w.faults, run_faults, &w);
    job_start(&w.sweep, run_sweep, &w);
    for (uint64_t i = 0; i < THREADS; i++) {
        vcpus[i] = (struct vcpu){ .w = &w, .index = i };
        job_start(&vcpus[i].job, visit_all, &vcpus[i]);
    }
    /* So slow that what comes is what the guest asks for. */
    source_limit(&w.source, 1);
    start_epoch(&w);
    while (breaks--) {
        break_off(&w);
        CHECK(recover(&w));
        start_epoch(&w);
    }
    while (!STATS_READ(w.source.stats.urgent_pages)) {
    }
    source_limit(&w.source, 0);
    CHECK(end(&w));
    for (uint64_t i = 0; i < THREADS; i++) {
        job_wait(&vcpus[i].job);
        CHECK_EQ(vcpus[i].wrong, 0);
    }
    CHECK(stop_faults(&w));
    CHECK(same_contents(&w));
    CHECK_EQ(destination_missing(&w.destination), 0);
    CHECK_EQ(w.destination.waiting.count, 0);
    CHECK_EQ(w.destination.stats.duplicate_pages, 0);
    CHECK(w.destination.stats.precopy_pages > 0);
    CHECK(w.destination.stats.postcopy_pages > 0);
    CHECK(w.source.stats.requests > 0);
    CHECK_EQ(w.destination.stats.preempt_pages > 0, two_channels);
    disconnect_both(&w);
    world_close(&w);
}

static void test_postcopy(void)
{
    migrate(&small, PLACE_CONTINUE, false, 0);
    migrate(&small, PLACE_COPY, false, 0);
}

static void test_postcopy_preempt(void)
{
    migrate(&small, PLACE_CONTINUE, true, 0);
    migrate(&small, PLACE_COPY, true, 0);
}

static void test_postcopy_recovery(void)
{
    migrate(&small, PLACE_CONTINUE, false, 1);
    migrate(&small, PLACE_CONTINUE, true, 3);
    migrate(&small, PLACE_COPY, true, 2);
}

static void test_postcopy_huge(void)
{
    migrate(&huge, PLACE_CONTINUE, false, 0);
    migrate(&huge, PLACE_CONTINUE, true, 0);
    migrate(&huge, PLACE_COPY, true, 0);
}

static void test_postcopy_huge_recovery(void)
{
    migrate(&huge, PLACE_CONTINUE, true, 1);
    migrate(&huge, PLACE_COPY, false, 1);
}

int main(void)
{
    uint32_t abilities = 0;
    int uffd = open_uffd();

    if (uffd < 0) {
        return check_skip("userfaultfd is not permitted");
    }
    NEED(RESULT_IS_OK(uffd_negotiate(uffd, &abilities)));
    close(uffd);
    if (!(abilities & UFFD_CAN_WP_ASYNC)) {
        return check_skip("no asynchronous write protection (Linux 6.7)");
    }
    RUN(test_postcopy);
    RUN(test_postcopy_preempt);
    RUN(test_postcopy_recovery);
    if (have_huge_pages()) {
        RUN(test_postcopy_huge);
        RUN(test_postcopy_huge_recovery);
    } else {
        fprintf(stderr, "no huge pages: not tested\n");
    }
    return check_status();
}
