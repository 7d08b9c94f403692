#include "rpath.h"
#include "upstream.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECTION 1
#define SMALL_PAGES UINT64_C(300)
#define HUGE_HOSTS UINT64_C(3)

static const struct block_spec specs[] = {
    { .idstr = "ram", .length = SMALL_PAGES * PAGE, .page_size = PAGE },
    { .idstr = "huge",
      .length = HUGE_HOSTS * HUGE,
      .page_size = HUGE,
      .plain = true },
};

/* Who fills it, as far as the other side can tell. */
struct filler {
    int received_fd;
    struct bitmap received[2];
    char directory[32];
    char path[64];
    int fd; /* what is asked for comes here */
};

static void filler_open(struct filler *f)
{
    const uint64_t pages[] = { SMALL_PAGES, specs[1].length / PAGE };
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    uint64_t offset = 0;

    *f = (struct filler){ .received_fd = memfd_create("received", 0) };
    NEED(f->received_fd >= 0);
    NEED(ftruncate(f->received_fd, (off_t)(2 * bitmap_length(pages[0]) +
                                           2 * bitmap_length(pages[1]))) == 0);
    for (int i = 0; i < 2; i++) {
        NEED(RESULT_IS_OK(bitmap_open_file(&f->received[i], pages[i],
                                           f->received_fd, offset)));
        offset += 2 * bitmap_length(pages[i]);
    }
    strcpy(f->directory, "arriving-XXXXXX");
    NEED(mkdtemp(f->directory));
    snprintf(f->path, sizeof(f->path), "%s/upstream", f->directory);
    strcpy(address.sun_path, f->path);
    f->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    NEED(f->fd >= 0);
    NEED(bind(f->fd, (struct sockaddr *)&address, sizeof(address)) == 0);
}

static void filler_close(struct filler *f)
{
    bitmap_close(&f->received[0]);
    bitmap_close(&f->received[1]);
    close(f->received_fd);
    close(f->fd);
    NEED(unlink(f->path) == 0 && rmdir(f->directory) == 0);
}

/* A source in postcopy that owes everything, of which nothing is here. */
struct fixture {
    struct guest guest;
    struct filler filler;
    struct stored stored;
    struct arriving arriving;
    struct source source;
    struct line main;
    struct line preempt;
    struct walker walker;
    struct walker urgent;
    struct job readers[2];
    int fd;
};

static void fixture_open(struct fixture *f)
{
    guest_open(&f->guest, specs, 2);
    filler_open(&f->filler);
    f->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    NEED(f->fd >= 0);
    NEED(RESULT_IS_OK(ram_prepare_source(&f->guest.ram)));
    NEED(RESULT_IS_OK(source_open(&f->source, &f->guest.ram, SECTION)));
    NEED(RESULT_IS_OK(stored_open(&f->stored, &f->guest.ram, NULL)));
    NEED(RESULT_IS_OK(arriving_open(&f->arriving, &f->guest.ram,
                                    f->filler.received_fd, f->fd,
                                    f->filler.path)));
    NEED(RESULT_IS_OK(source_serve(&f->source, &f->stored)));
    source_await(&f->source, &f->arriving);
    line_open(&f->main);
    line_open(&f->preempt);
    source_connect(&f->source, &f->main.channel, &f->preempt.channel);
    for (uint32_t i = 0; i < 2; i++) {
        struct ram_block *b = &f->guest.ram.blocks[i];

        bitmap_set_range(&b->dirty, 0, b->dirty.bits);
    }
    source_owe_dirty(&f->source);
    walker_open(&f->walker, f->main.peer, &f->guest.ram, SECTION);
    f->walker.asker = &f->source;
    f->walker.whole_hosts = true;
    walker_share(&f->urgent, &f->walker, f->preempt.peer);
}

static void start_readers(struct fixture *f)
{
    job_start(&f->readers[0], walker_run, &f->walker);
    job_start(&f->readers[1], walker_run, &f->urgent);
}

static void finish_readers(struct fixture *f)
{
    line_finish(&f->main);
    line_finish(&f->preempt);
    CHECK_SOFT(RESULT_IS_OK(job_wait(&f->readers[0])));
    CHECK_SOFT(RESULT_IS_OK(job_wait(&f->readers[1])));
}

static void fixture_close(struct fixture *f)
{
    walker_close(&f->walker);
    line_close(&f->main);
    line_close(&f->preempt);
    arriving_close(&f->arriving);
    stored_close(&f->stored);
    source_close(&f->source);
    filler_close(&f->filler);
    guest_close(&f->guest);
    close(f->fd);
}

static struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

static uint64_t seed_of(uint32_t i, uint64_t page)
{
    return (uint64_t)(i + 1) << 32 | page;
}

/* Every third page is one of zeroes, and a hole. */
static bool has_data(uint64_t page)
{
    return page % 3;
}

static void arrive(struct fixture *f, uint32_t i, uint64_t page)
{
    if (has_data(page)) {
        pattern_fill(f->guest.memory[i] + page * PAGE, seed_of(i, page));
    }
    bitmap_test_and_set(&f->filler.received[i], page);
}

static void arrive_host(struct fixture *f, uint32_t i, uint64_t host)
{
    uint64_t per_host = block_pages_per_host(block(f, i));

    for (uint64_t p = 0; p < per_host; p++) {
        arrive(f, i, host * per_host + p);
    }
}

/* All that is not here, the last pages first. */
static void arrive_rest(struct fixture *f)
{
    for (uint32_t i = 2; i-- > 0;) {
        for (uint64_t p = block_pages(block(f, i)); p-- > 0;) {
            if (!bitmap_test(&f->filler.received[i], p)) {
                arrive(f, i, p);
            }
        }
    }
}

static bool came(struct fixture *f, uint32_t i, uint64_t page, uint32_t times)
{
    const uint8_t *image = f->walker.images[i] + page * PAGE;

    if (f->walker.counts[i][page] != times) {
        fprintf(stderr, "block %u page %lu came %u times\n", i,
                (unsigned long)page, f->walker.counts[i][page]);
        return false;
    }
    return !times || (has_data(page) ? pattern_is(image, seed_of(i, page)) :
                                       is_all_zero(image));
}

static bool all_came(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(f, i)); p++) {
            if (!came(f, i, p, 1)) {
                return false;
            }
        }
    }
    return true;
}

static void wait_for_records(struct walker *w, uint64_t records)
{
    while (__atomic_load_n(&w->records, __ATOMIC_SEQ_CST) < records) {
    }
}

static struct result run_pump(void *source)
{
    return pump_postcopy(source);
}

static struct result run_rpath(void *source)
{
    struct rp_message message;

    return rpath_run(source, &message);
}

static void ask_for(struct fixture *f, const char *idstr, uint64_t offset,
                    uint32_t length)
{
    struct script s = { 0 };

    put_be16(&s, 3);
    put_be16(&s, (uint16_t)(13 + strlen(idstr)));
    put_be64(&s, offset);
    put_be32(&s, length);
    put_name(&s, idstr);
    send_all(f->main.peer, s.bytes, s.size);
    script_free(&s);
}

static struct upstream_request asked(struct fixture *f)
{
    struct upstream_request request;

    NEED(recv(f->filler.fd, &request, sizeof(request), 0) == sizeof(request));
    return request;
}

/* --- what is here --------------------------------------------------------- */

static void test_a_host_page_is_here_when_all_of_it_is(void)
{
    struct fixture f;
    uint64_t per_host = HUGE / PAGE;

    fixture_open(&f);
    CHECK(!arriving_has(&f.arriving, block(&f, 0), 70));
    arrive(&f, 0, 70);
    CHECK(arriving_has(&f.arriving, block(&f, 0), 70));
    CHECK_EQ(arriving_word(&f.arriving, block(&f, 0), 1), UINT64_C(1) << 6);
    for (uint64_t p = 0; p < per_host; p++) {
        CHECK(!arriving_has(&f.arriving, block(&f, 1), 2));
        CHECK_EQ(arriving_word(&f.arriving, block(&f, 1), 0), 0);
        arrive(&f, 1, 2 * per_host + p);
    }
    CHECK(arriving_has(&f.arriving, block(&f, 1), 2));
    CHECK_EQ(arriving_word(&f.arriving, block(&f, 1), 0), 4);
    fixture_close(&f);
}

static void test_a_file_of_another_length(void)
{
    struct fixture f;
    struct arriving *other = malloc(sizeof(*other));
    int fd = memfd_create("received", 0);
    struct result r;

    NEED(other && fd >= 0);
    fixture_open(&f);
    r = arriving_open(other, &f.guest.ram, fd, f.fd, f.filler.path);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_TEXT(r.what, "length of what has arrived");
    arriving_close(other);
    fixture_close(&f);
    free(other);
    close(fd);
}

/* --- the background --------------------------------------------------------
 */

/* What comes is sent, and the pump ends when all has come. */
static void test_pages_are_sent_as_they_arrive(void)
{
    struct fixture f;
    struct job pump;

    fixture_open(&f);
    start_readers(&f);
    job_start(&pump, run_pump, &f.source);
    for (uint64_t p = 5; p < 130; p++) {
        arrive(&f, 0, p);
    }
    wait_for_records(&f.walker, 125);
    arrive_host(&f, 1, 1);
    wait_for_records(&f.walker, 125 + HUGE / PAGE);
    arrive_rest(&f);
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    finish_readers(&f);
    CHECK(all_came(&f));
    CHECK_EQ(source_owed_pages(&f.source), 0);
    fixture_close(&f);
}

static void test_zeroes_are_left_out_once_they_are_here(void)
{
    struct fixture f;
    struct job pump;

    fixture_open(&f);
    f.stored.leave_out_zeroes = true;
    start_readers(&f);
    job_start(&pump, run_pump, &f.source);
    arrive(&f, 0, 1);
    wait_for_records(&f.walker, 1);
    arrive_rest(&f);
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    finish_readers(&f);
    for (uint64_t p = 0; p < SMALL_PAGES; p++) {
        CHECK(came(&f, 0, p, has_data(p)));
    }
    CHECK_EQ(f.source.stats.left_out_pages, SMALL_PAGES / 3);
    fixture_close(&f);
}

static void test_the_pump_can_be_stopped_while_it_waits(void)
{
    struct fixture f;
    struct job pump;

    fixture_open(&f);
    start_readers(&f);
    job_start(&pump, run_pump, &f.source);
    arrive(&f, 0, 1);
    wait_for_records(&f.walker, 1);
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    finish_readers(&f);
    fixture_close(&f);
}

static void test_precopy_cannot_wait(void)
{
    struct fixture f;
    struct result r;

    fixture_open(&f);
    r = pump_precopy(&f.source);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK(strstr(r.what, "has not wholly arrived"));
    CHECK(!is_readable(f.main.peer));
    fixture_close(&f);
}

/* --- requests --------------------------------------------------------------
 */

/* Asked for upstream, once, and sent when it comes; others do not wait. */
static void test_a_request_waits_for_its_page(void)
{
    struct fixture f;
    struct job server;
    struct upstream_request request;

    fixture_open(&f);
    start_readers(&f);
    arrive(&f, 0, 200);
    job_start(&server, run_rpath, &f.source);
    ask_for(&f, "ram", 7 * PAGE, PAGE);
    ask_for(&f, "ram", 7 * PAGE, PAGE);
    ask_for(&f, "huge", HUGE, HUGE);
    ask_for(&f, "ram", 200 * PAGE, PAGE);
    wait_for_records(&f.urgent, 1);
    request = asked(&f);
    CHECK_EQ(request.block, 0);
    CHECK_EQ(request.length, PAGE);
    CHECK_EQ(request.offset, 7 * PAGE);
    do { /* a machine that is busy may see the first one asked for again */
        request = asked(&f);
    } while (request.block == 0);
    CHECK_EQ(request.length, HUGE);
    CHECK_EQ(request.offset, HUGE);
    arrive(&f, 0, 7);
    wait_for_records(&f.urgent, 2);
    arrive_host(&f, 1, 1);
    wait_for_records(&f.urgent, 2 + HUGE / PAGE);
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&server).kind, RESULT_STOPPED);
    finish_readers(&f);
    CHECK(came(&f, 0, 7, 1));
    CHECK(came(&f, 0, 200, 1));
    CHECK(came(&f, 1, HUGE / PAGE, 1));
    CHECK_EQ(f.arriving.count, 0);
    fixture_close(&f);
}

#define SECOND UINT64_C(1000000000)

static void test_a_page_is_asked_for_again(void)
{
    struct fixture f;
    struct awaited found;

    fixture_open(&f);
    CHECK(arriving_await(&f.arriving, block(&f, 0), 9, SECOND));
    CHECK(!arriving_take(&f.arriving, &found));
    arriving_ask(&f.arriving, SECOND);
    arriving_ask(&f.arriving, SECOND + 1000);
    CHECK_EQ(f.arriving.asked, 1);
    arriving_ask(&f.arriving, 2 * SECOND);
    CHECK_EQ(f.arriving.asked, 2);
    arrive(&f, 0, 9);
    CHECK(arriving_take(&f.arriving, &found));
    CHECK_EQ(found.host, 9);
    CHECK_EQ(found.since_ns, SECOND);
    CHECK(!arriving_take(&f.arriving, &found));
    arriving_ask(&f.arriving, 4 * SECOND);
    CHECK_EQ(f.arriving.asked, 2);
    fixture_close(&f);
}

/* Who fills it comes back: nothing is lost but time. */
static void test_nobody_is_there_to_ask(void)
{
    struct fixture f;
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    fixture_open(&f);
    close(f.filler.fd);
    CHECK(arriving_await(&f.arriving, block(&f, 0), 9, SECOND));
    arriving_ask(&f.arriving, SECOND);
    NEED(unlink(f.filler.path) == 0);
    arriving_ask(&f.arriving, SECOND + 1);
    CHECK_EQ(f.arriving.asked, 0);
    strcpy(address.sun_path, f.filler.path);
    f.filler.fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    NEED(bind(f.filler.fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    arriving_ask(&f.arriving, SECOND + 2);
    CHECK_EQ(asked(&f).offset, 9 * PAGE);
    fixture_close(&f);
}

static void test_a_new_connection_asks_anew(void)
{
    struct fixture f;
    struct awaited found;

    fixture_open(&f);
    CHECK(arriving_await(&f.arriving, block(&f, 0), 9, SECOND));
    source_connect(&f.source, &f.main.channel, &f.preempt.channel);
    arrive(&f, 0, 9);
    CHECK(!arriving_take(&f.arriving, &found));
    fixture_close(&f);
}

static void test_no_more_than_can_be_awaited(void)
{
    struct fixture f;

    fixture_open(&f);
    f.arriving.count = AWAITED_MAX;
    CHECK(!arriving_await(&f.arriving, block(&f, 0), 9, SECOND));
    f.arriving.count = 0;
    fixture_close(&f);
}

/* --- upstream --------------------------------------------------------------
 */

struct upstream_fixture {
    struct guest guest;
    struct destination destination;
    struct line line;
    struct job job;
    int fds[2];
    int stop_fd;
};

static struct result run_upstream(void *arg)
{
    struct upstream_fixture *f = arg;

    return upstream_answer(&f->destination, f->fds[0], f->stop_fd);
}

static void pass_on(struct upstream_fixture *f, uint32_t number,
                    uint32_t length, uint64_t offset)
{
    struct upstream_request request = { number, length, offset };

    NEED(send(f->fds[1], &request, sizeof(request), 0) == sizeof(request));
}

static void test_requests_are_passed_on(void)
{
    struct upstream_fixture f;
    struct script s = { 0 };
    uint8_t got[200];

    guest_open(&f.guest, specs, 1);
    NEED(RESULT_IS_OK(ram_prepare_destination(&f.guest.ram, -1)));
    NEED(RESULT_IS_OK(destination_open(&f.destination, &f.guest.ram, PLACE_FILE,
                                       -1, NULL, 0)));
    line_open(&f.line);
    rpath_connect(&f.destination.rpath, &f.line.channel);
    NEED(socketpair(AF_UNIX, SOCK_DGRAM, 0, f.fds) == 0);
    f.stop_fd = make_event();
    bitmap_test_and_set(&f.guest.ram.blocks[0].received, 3);
    job_start(&f.job, run_upstream, &f);
    pass_on(&f, 0, PAGE, 3 * PAGE); /* is here */
    pass_on(&f, 1, PAGE, 0);
    pass_on(&f, UINT32_MAX, PAGE, 0);
    pass_on(&f, 0, PAGE, SMALL_PAGES * PAGE);
    pass_on(&f, 0, PAGE, UINT64_MAX - PAGE + 1);
    pass_on(&f, 0, PAGE, 1);
    pass_on(&f, 0, 0, 0);
    pass_on(&f, 0, 3 * PAGE, 0);
    pass_on(&f, 0, HUGE, 0); /* longer than the block */
    pass_on(&f, 0, 2 * HUGE, 0);
    NEED(send(f.fds[1], got, 0, 0) == 0);
    NEED(send(f.fds[1], got, 15, 0) == 15);
    NEED(send(f.fds[1], got, 17, 0) == 17);
    pass_on(&f, 0, PAGE, 4 * PAGE);
    pass_on(&f, 0, 2 * PAGE, 2 * PAGE); /* one of the two is here */
    put_be16(&s, 3);
    put_be16(&s, 16);
    put_be64(&s, 4 * PAGE);
    put_be32(&s, PAGE);
    put_name(&s, "ram");
    put_be16(&s, 4);
    put_be16(&s, 12);
    put_be64(&s, 2 * PAGE);
    put_be32(&s, 2 * PAGE);
    NEED(s.size <= sizeof(got));
    receive_all(f.line.peer, got, s.size);
    CHECK(memcmp(got, s.bytes, s.size) == 0);
    set_event(f.stop_fd);
    CHECK_EQ(job_wait(&f.job).kind, RESULT_STOPPED);
    CHECK(!is_readable(f.line.peer));
    CHECK_EQ(f.destination.rpath.requests, 2);
    script_free(&s);
    destination_close(&f.destination);
    line_close(&f.line);
    guest_close(&f.guest);
    close(f.fds[0]);
    close(f.fds[1]);
    close(f.stop_fd);
}

int main(void)
{
    RUN(test_a_host_page_is_here_when_all_of_it_is);
    RUN(test_a_file_of_another_length);
    RUN(test_pages_are_sent_as_they_arrive);
    RUN(test_zeroes_are_left_out_once_they_are_here);
    RUN(test_the_pump_can_be_stopped_while_it_waits);
    RUN(test_precopy_cannot_wait);
    RUN(test_a_request_waits_for_its_page);
    RUN(test_a_page_is_asked_for_again);
    RUN(test_nobody_is_there_to_ask);
    RUN(test_a_new_connection_asks_anew);
    RUN(test_no_more_than_can_be_awaited);
    RUN(test_requests_are_passed_on);
    return check_status();
}
