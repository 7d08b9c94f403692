#include "fault.h"

#include "check.h"
#include "support.h"
#include "uffd.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 256

static const struct block_spec specs[] = {
    { .idstr = "ram", .length = PAGES * PAGE, .page_size = PAGE },
    { .idstr = "vga", .length = 8 * PAGE, .page_size = PAGE },
};
static const struct block_spec huge_specs[] = {
    { .idstr = "ram", .length = 4 * HUGE, .page_size = HUGE },
};

/* A destination that answers faults, and the source's end of its line. */
struct fixture {
    struct guest guest;
    struct destination d;
    struct line line;
    int uffd;
    int stop_fd;
    struct job loop;
};

static struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

static uint8_t *at(struct fixture *f, uint32_t i, uint64_t page)
{
    return f->guest.memory[i] + page * PAGE;
}

static void fixture_open(struct fixture *f, const struct block_spec *blocks,
                         uint32_t count, int way)
{
    guest_open(&f->guest, blocks, count);
    NEED(RESULT_IS_OK(ram_prepare_destination(&f->guest.ram, -1)));
    f->uffd = open_ready_uffd();
    f->stop_fd = make_event();
    line_open(&f->line);
    NEED(RESULT_IS_OK(
        destination_open(&f->d, &f->guest.ram, way, f->uffd, NULL, 0)));
    rpath_connect(&f->d.rpath, &f->line.channel);
}

static struct result run_faults(void *arg)
{
    struct fixture *f = arg;

    return fault_run(&f->d, f->stop_fd);
}

static void listen_and_run(struct fixture *f)
{
    NEED(RESULT_IS_OK(destination_listen(&f->d)));
    job_start(&f->loop, run_faults, f);
}

/* Ends the fault loop. */
static struct result finish(struct fixture *f)
{
    struct result r;

    set_event(f->stop_fd);
    r = job_wait(&f->loop);
    NEED(RESULT_IS_OK(destination_finish(&f->d)));
    return r;
}

static void fixture_close(struct fixture *f)
{
    destination_close(&f->d);
    line_close(&f->line);
    close(f->stop_fd);
    close(f->uffd);
    guest_close(&f->guest);
}

static void early(struct fixture *f, uint64_t page, uint64_t seed)
{
    uint8_t bytes[PAGE];
    struct iovec iov = { bytes, PAGE };

    pattern_fill(bytes, seed);
    NEED(RESULT_IS_OK(place_early(&f->d, block(f, 0), page, &iov, 1)));
}

static struct result late(struct fixture *f, uint32_t i, uint64_t page,
                          uint64_t seed)
{
    uint8_t bytes[PAGE];
    struct iovec iov = { bytes, PAGE };

    pattern_fill(bytes, seed);
    NEED(place_claim(&f->d, block(f, i), page));
    return place_pages(&f->d, block(f, i), page, &iov, 1);
}

/* The next request that the source would read. */
struct request {
    uint16_t type;
    uint64_t offset;
    uint32_t length;
};

static struct request next_request(struct fixture *f)
{
    uint8_t bytes[300];
    struct request r;

    receive_all(f->line.peer, bytes, 4);
    r.type = wire_get_be16(bytes);
    receive_all(f->line.peer, bytes, wire_get_be16(bytes + 2));
    r.offset = wire_get_be64(bytes);
    r.length = wire_get_be32(bytes + 8);
    return r;
}

/* A thread of the guest: reads one page. */
struct look {
    const uint8_t *at;
    uint8_t got[PAGE];
    struct job job;
};

static struct result look_at(void *arg)
{
    struct look *l = arg;

    memcpy(l->got, l->at, PAGE);
    return result_ok();
}

static void look_start(struct look *l, const uint8_t *at_page)
{
    l->at = at_page;
    job_start(&l->job, look_at, l);
}

static void wait_for(const uint64_t *counter, uint64_t value)
{
    while (__atomic_load_n(counter, __ATOMIC_SEQ_CST) < value) {
    }
}

/* --- pages that are here ------------------------------------------------- */

/* No request leaves for what is here, with data or without. */
static void test_fault_on_a_page_that_is_here(void)
{
    struct fixture f;

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    for (uint64_t p = 0; p < 64; p++) {
        early(&f, p, p);
    }
    NEED(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), 100)));
    listen_and_run(&f);
    CHECK(pattern_is(at(&f, 0, 3), 3));
    CHECK(pattern_is(at(&f, 0, 4), 4)); /* mapped along with it */
    CHECK(is_all_zero(at(&f, 0, 100)));
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    CHECK_EQ(f.d.stats.faults, 2);
    CHECK_EQ(f.d.stats.faults_here, 2);
    CHECK_EQ(f.d.rpath.requests, 0);
    CHECK_EQ(f.d.waiting.latency.count, 0);
    fixture_close(&f);
}

/* The kernel may unmap a page again; its contents are not lost. */
static void unmapped_again(bool zero)
{
    struct fixture f;

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    if (zero) {
        NEED(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), 7)));
    } else {
        early(&f, 7, 1);
    }
    listen_and_run(&f);
    CHECK(zero ? is_all_zero(at(&f, 0, 7)) : pattern_is(at(&f, 0, 7), 1));
    pattern_fill(at(&f, 0, 7), 2);
    CHECK_EQ(madvise(at(&f, 0, 7), PAGE, MADV_DONTNEED), 0);
    CHECK(pattern_is(at(&f, 0, 7), 2));
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    CHECK_EQ(f.d.stats.faults_here, 2);
    fixture_close(&f);
}

static void test_unmapped_again(void)
{
    unmapped_again(false);
    unmapped_again(true);
}

/* Punched out by the guest, a page reads as zero: no old data comes back. */
static void given_back(int way)
{
    struct fixture f;

    fixture_open(&f, specs, 2, way);
    early(&f, 7, 1);
    early(&f, 8, 2);
    listen_and_run(&f);
    CHECK(pattern_is(at(&f, 0, 7), 1));
    CHECK_EQ(madvise(at(&f, 0, 7), 2 * PAGE, MADV_REMOVE), 0);
    CHECK(is_all_zero(at(&f, 0, 7)));
    CHECK(is_all_zero(at(&f, 0, 8)));
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    CHECK_EQ(f.d.rpath.requests, 0);
    fixture_close(&f);
}

static void test_given_back(void)
{
    given_back(PLACE_COPY);
    given_back(PLACE_CONTINUE);
}

/* --- pages that are missing ---------------------------------------------- */

/* Three threads, one page: one request, and the page wakes them all. */
static void request_once(int way)
{
    struct fixture f;
    struct look looks[3];
    struct request r;

    fixture_open(&f, specs, 2, way);
    early(&f, 5, 99); /* stale */
    NEED(RESULT_IS_OK(destination_discard(&f.d, 0, 5 * PAGE, PAGE)));
    listen_and_run(&f);
    for (int i = 0; i < 3; i++) {
        look_start(&looks[i], at(&f, 0, 5));
    }
    r = next_request(&f);
    CHECK_EQ(r.type, RP_REQ_PAGES_ID);
    CHECK_EQ(r.offset, 5 * PAGE);
    CHECK_EQ(r.length, PAGE);
    wait_for(&f.d.stats.faults_known, 2);
    CHECK(RESULT_IS_OK(late(&f, 0, 5, 1)));
    for (int i = 0; i < 3; i++) {
        job_wait(&looks[i].job);
        CHECK(pattern_is(looks[i].got, 1));
    }
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    CHECK(!is_readable(f.line.peer));
    CHECK_EQ(f.d.rpath.requests, 1);
    CHECK_EQ(f.d.waiting.latency.count, 3);
    CHECK_EQ(f.d.waiting.other_faults, 3);
    CHECK_EQ(f.d.waiting.count, 0);
    fixture_close(&f);
}

static void test_request_once(void)
{
    request_once(PLACE_COPY);
    request_once(PLACE_CONTINUE);
}

static void zero_page_wakes(int way)
{
    struct fixture f;
    struct look look;

    fixture_open(&f, specs, 2, way);
    early(&f, 5, 99);
    NEED(RESULT_IS_OK(destination_discard(&f.d, 0, 5 * PAGE, PAGE)));
    listen_and_run(&f);
    for (uint64_t p = 5; p < 7; p++) { /* a stale page and a hole */
        look_start(&look, at(&f, 0, p));
        CHECK_EQ(next_request(&f).offset, p * PAGE);
        CHECK(place_claim(&f.d, block(&f, 0), p));
        CHECK(RESULT_IS_OK(place_zero(&f.d, block(&f, 0), p)));
        job_wait(&look.job);
        CHECK(is_all_zero(look.got));
    }
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    fixture_close(&f);
}

static void test_zero_page_wakes(void)
{
    zero_page_wakes(PLACE_COPY);
    zero_page_wakes(PLACE_CONTINUE);
}

/* The second request of a block is unnamed; another block is named again. */
static void test_requests_name_blocks(void)
{
    struct fixture f;
    struct look looks[3];
    static const uint16_t types[] = { RP_REQ_PAGES_ID, RP_REQ_PAGES,
                                      RP_REQ_PAGES_ID };

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    listen_and_run(&f);
    for (uint32_t i = 0; i < 3; i++) {
        look_start(&looks[i], at(&f, i / 2, i));
        CHECK_EQ(next_request(&f).type, types[i]);
    }
    for (uint32_t i = 0; i < 3; i++) {
        CHECK(RESULT_IS_OK(late(&f, i / 2, i, i)));
        job_wait(&looks[i].job);
        CHECK(pattern_is(looks[i].got, i));
    }
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    fixture_close(&f);
}

/* Without a connection what is here is served, what is not is remembered. */
static void test_no_connection(void)
{
    struct fixture f;
    struct look look;

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    early(&f, 5, 5);
    rpath_connect(&f.d.rpath, NULL);
    listen_and_run(&f);
    look_start(&look, at(&f, 0, 70));
    while (!bitmap_test(&block(&f, 0)->requested, 70)) {
    }
    CHECK(pattern_is(at(&f, 0, 5), 5));
    CHECK_EQ(f.d.rpath.requests, 0);
    /* The next connection: what is on the list is asked for again. */
    rpath_connect(&f.d.rpath, &f.line.channel);
    CHECK(RESULT_IS_OK(fault_ask_again(&f.d)));
    CHECK_EQ(next_request(&f).offset, 70 * PAGE);
    CHECK(!is_readable(f.line.peer)); /* not for what is here */
    CHECK(RESULT_IS_OK(late(&f, 0, 70, 70)));
    job_wait(&look.job);
    CHECK(pattern_is(look.got, 70));
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    fixture_close(&f);
}

/* A peer that is gone is the load loop's to report. */
static void test_broken_connection(void)
{
    struct fixture f;
    struct look look;

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    line_hang_up(&f.line);
    listen_and_run(&f);
    look_start(&look, at(&f, 0, 1));
    wait_for(&f.d.stats.faults, 1);
    CHECK(RESULT_IS_OK(late(&f, 0, 1, 1)));
    job_wait(&look.job);
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    fixture_close(&f);
}

/* A new fault loop, after the first was stopped with a thread waiting. */
static void test_run_again(void)
{
    struct fixture f;
    struct look looks[2];

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    early(&f, 9, 9);
    listen_and_run(&f);
    look_start(&looks[0], at(&f, 0, 1));
    next_request(&f);
    set_event(f.stop_fd);
    CHECK_EQ(job_wait(&f.loop).kind, RESULT_STOPPED);
    look_start(&looks[1], at(&f, 0, 9));
    {
        uint64_t drained;

        CHECK_EQ(read(f.stop_fd, &drained, sizeof(drained)), 8);
    }
    job_start(&f.loop, run_faults, &f);
    job_wait(&looks[1].job);
    CHECK(pattern_is(looks[1].got, 9));
    CHECK(RESULT_IS_OK(late(&f, 0, 1, 1)));
    job_wait(&looks[0].job);
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    fixture_close(&f);
}

/*
 * A page was written and marked, and then could not be mapped: nobody else will
 * do it, so who waits for it asks the fault loop again.
 */
static void test_new_epoch_wakes(void)
{
    struct fixture f;
    struct look look;
    uint8_t bytes[PAGE];

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    listen_and_run(&f);
    look_start(&look, at(&f, 0, 3));
    CHECK_EQ(next_request(&f).offset, 3 * PAGE);
    wait_for(&f.d.stats.faults, 1);
    pattern_fill(bytes, 33);
    CHECK_EQ(pwrite(block(&f, 0)->fd, bytes, PAGE, 3 * PAGE), (ssize_t)PAGE);
    bitmap_test_and_set(&block(&f, 0)->populated, 3);
    bitmap_test_and_set(&block(&f, 0)->received, 3);
    CHECK(RESULT_IS_OK(destination_begin_epoch(&f.d)));
    job_wait(&look.job);
    CHECK(pattern_is(look.got, 33));
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    CHECK_EQ(f.d.waiting.count, 0);
    CHECK_EQ(destination_missing(&f.d), PAGES + 8 - 1);
    fixture_close(&f);
}

/* --- blocktime ----------------------------------------------------------- */

struct vcpu {
    const uint8_t *at;
    uint32_t thread; /* atomic */
    int go_fd;
};

static struct result run_vcpu(void *arg)
{
    struct vcpu *v = arg;
    struct pollfd p = { .fd = v->go_fd, .events = POLLIN };

    __atomic_store_n(&v->thread, thread_id(), __ATOMIC_SEQ_CST);
    NEED(poll(&p, 1, -1) == 1);
    (void)*(const volatile uint8_t *)v->at;
    return result_ok();
}

static void test_blocktime(void)
{
    struct fixture f;
    struct vcpu vcpus[2] = { 0 };
    struct job jobs[2];
    uint32_t threads[2];

    fixture_open(&f, specs, 2, PLACE_CONTINUE);
    for (uint32_t i = 0; i < 2; i++) {
        vcpus[i].at = at(&f, 0, i);
        vcpus[i].go_fd = make_event();
        job_start(&jobs[i], run_vcpu, &vcpus[i]);
        while (!(threads[i] =
                     __atomic_load_n(&vcpus[i].thread, __ATOMIC_SEQ_CST))) {
        }
    }
    waiting_close(&f.d.waiting);
    waiting_open(&f.d.waiting, threads, 2);
    listen_and_run(&f);
    for (uint32_t i = 0; i < 2; i++) {
        set_event(vcpus[i].go_fd);
        CHECK_EQ(next_request(&f).offset, i * PAGE);
        CHECK(RESULT_IS_OK(late(&f, 0, i, i)));
        job_wait(&jobs[i]);
        close(vcpus[i].go_fd);
    }
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(f.d.waiting.vcpus[i].faults, 1);
        CHECK(f.d.waiting.vcpus[i].blocked_ns > 0);
    }
    CHECK_EQ(f.d.waiting.all_blocked_ns, 0);
    CHECK_EQ(f.d.waiting.other_faults, 0);
    fixture_close(&f);
}

/* --- huge pages ---------------------------------------------------------- */

static void huge(int way)
{
    struct fixture f;
    struct look looks[2];
    struct request r;
    uint8_t *scratch = calloc(1, HUGE);
    uint8_t *to;

    fixture_open(&f, huge_specs, 1, way);
    /* Page 0 is here and zero; page 1 comes with data, page 2 as zero. */
    for (uint64_t p = 0; p < 512; p++) {
        NEED(RESULT_IS_OK(place_early_zero(&f.d, block(&f, 0), p)));
    }
    listen_and_run(&f);
    CHECK(is_all_zero(at(&f, 0, 3)));
    look_start(&looks[0], at(&f, 0, 512 + 7));
    r = next_request(&f);
    CHECK_EQ(r.offset, HUGE);
    CHECK_EQ(r.length, HUGE);
    look_start(&looks[1], at(&f, 0, 1024 + 7));
    CHECK_EQ(next_request(&f).offset, 2 * HUGE);

    CHECK(place_claim(&f.d, block(&f, 0), 1));
    to = place_huge_at(&f.d, block(&f, 0), 1, scratch);
    pattern_fill(to + 7 * PAGE, 7);
    CHECK(RESULT_IS_OK(place_huge(&f.d, block(&f, 0), 1, to)));
    job_wait(&looks[0].job);
    CHECK(pattern_is(looks[0].got, 7));

    CHECK(place_claim(&f.d, block(&f, 0), 2));
    CHECK(RESULT_IS_OK(place_zero(&f.d, block(&f, 0), 2)));
    job_wait(&looks[1].job);
    CHECK(is_all_zero(looks[1].got));
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    fixture_close(&f);
    free(scratch);
}

static void test_huge(void)
{
    huge(PLACE_COPY);
    huge(PLACE_CONTINUE);
}

/* --- many at once -------------------------------------------------------- */

#define LOOKERS 4

struct looker {
    struct fixture *f;
    uint64_t index;
};

/* Every page, in an order of its own; adds a mark of its own to each. */
static struct result look_everywhere(void *arg)
{
    struct looker *l = arg;
    uint64_t random = l->index + 1;

    for (uint64_t i = 0, p = next_random(&random); i < PAGES; i++, p += 77) {
        uint64_t *words = (uint64_t *)(void *)at(l->f, 0, p % PAGES);

        __atomic_fetch_add(&words[l->index], 1, __ATOMIC_RELAXED);
    }
    return result_ok();
}

struct sender {
    struct fixture *f;
    uint64_t first; /* the order in which it sends */
    uint64_t step;
};

static struct result send_everything(void *arg)
{
    struct sender *s = arg;

    for (uint64_t i = 0, p = s->first; i < PAGES; i++, p += s->step) {
        struct ram_block *b = block(s->f, 0);
        uint8_t bytes[PAGE];
        struct iovec iov = { bytes, PAGE };
        struct result r;

        if (!place_claim(&s->f->d, b, p % PAGES)) {
            continue;
        }
        pattern_fill(bytes, p % PAGES);
        r = p % PAGES % 4 == 3 ? place_zero(&s->f->d, b, p % PAGES) :
                                 place_pages(&s->f->d, b, p % PAGES, &iov, 1);
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    return result_ok();
}

/*
 * Two load loops and the fault loop decide between them who places, requests
 * and wakes. Nobody sleeps for ever, nothing the guest wrote is lost.
 */
static void many(int way)
{
    struct fixture f;
    struct job jobs[LOOKERS];
    struct job loads[2];
    struct looker lookers[LOOKERS];
    struct sender senders[2] = { { &f, 0, 1 }, { &f, PAGES - 1, PAGES - 1 } };

    fixture_open(&f, specs, 1, way);
    rpath_connect(&f.d.rpath, NULL);
    for (uint64_t p = 0; p < PAGES; p += 2) {
        early(&f, p, 999); /* stale */
    }
    NEED(RESULT_IS_OK(destination_discard(&f.d, 0, 0, PAGES * PAGE)));
    listen_and_run(&f);
    for (uint64_t i = 0; i < LOOKERS; i++) {
        lookers[i] = (struct looker){ &f, i };
        job_start(&jobs[i], look_everywhere, &lookers[i]);
    }
    for (int i = 0; i < 2; i++) {
        job_start(&loads[i], send_everything, &senders[i]);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(RESULT_IS_OK(job_wait(&loads[i])));
    }
    for (uint64_t i = 0; i < LOOKERS; i++) {
        job_wait(&jobs[i]);
    }
    CHECK_EQ(finish(&f).kind, RESULT_STOPPED);
    CHECK_EQ(destination_missing(&f.d), 0);
    CHECK_EQ(f.d.waiting.count, 0);
    CHECK_EQ(f.d.stats.duplicate_pages, PAGES);
    for (uint64_t p = 0; p < PAGES; p++) {
        uint64_t *words = (uint64_t *)(void *)at(&f, 0, p);

        for (uint64_t i = 0; i < LOOKERS; i++) {
            words[i]--;
        }
        CHECK(p % 4 == 3 ? is_all_zero(words) : pattern_is(words, p));
    }
    fixture_close(&f);
}

static void test_many(void)
{
    for (int i = 0; i < 10; i++) {
        many(PLACE_COPY);
        many(PLACE_CONTINUE);
    }
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
    if (!(abilities & UFFD_CAN_MINOR)) {
        return check_skip("no minor faults of shared memory (Linux 5.14)");
    }
    RUN(test_fault_on_a_page_that_is_here);
    RUN(test_unmapped_again);
    RUN(test_given_back);
    RUN(test_request_once);
    RUN(test_zero_page_wakes);
    RUN(test_requests_name_blocks);
    RUN(test_no_connection);
    RUN(test_broken_connection);
    RUN(test_run_again);
    RUN(test_new_epoch_wakes);
    RUN(test_blocktime);
    RUN(test_many);
    if (have_huge_pages()) {
        RUN(test_huge);
    } else {
        fprintf(stderr, "no huge pages: not tested\n");
    }
    return check_status();
}
