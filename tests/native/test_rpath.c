#include "rpath.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#define SECTION 1
#define SHUT 1
#define PONG 2

static const struct block_spec specs[] = {
    { .idstr = "ram", .length = 16 * PAGE, .page_size = PAGE },
    { .idstr = "huge", .length = 2 * HUGE, .page_size = HUGE, .plain = true },
};

/* A source in postcopy that owes everything. */
struct fixture {
    struct guest guest;
    struct source source;
    struct line main;
    struct line preempt;
};

static void fixture_open(struct fixture *f, bool preempt)
{
    guest_open(&f->guest, specs, 2);
    NEED(RESULT_IS_OK(ram_prepare_source(&f->guest.ram)));
    NEED(RESULT_IS_OK(source_open(&f->source, &f->guest.ram, SECTION)));
    line_open(&f->main);
    line_open(&f->preempt);
    source_connect(&f->source, &f->main.channel,
                   preempt ? &f->preempt.channel : &f->main.channel);
    for (uint32_t i = 0; i < 2; i++) {
        bitmap_set_range(&f->guest.ram.blocks[i].dirty, 0,
                         f->guest.ram.blocks[i].dirty.bits);
    }
    source_owe_dirty(&f->source);
}

static void fixture_close(struct fixture *f)
{
    line_close(&f->main);
    line_close(&f->preempt);
    source_close(&f->source);
    guest_close(&f->guest);
}

static void put_request(struct script *s, const char *idstr, uint64_t start,
                        uint32_t length)
{
    put_be16(s, idstr ? 3 : 4);
    put_be16(s, (uint16_t)(12 + (idstr ? 1 + strlen(idstr) : 0)));
    put_be64(s, start);
    put_be32(s, length);
    if (idstr) {
        put_name(s, idstr);
    }
}

static void put_word(struct script *s, uint16_t type, uint32_t value)
{
    put_be16(s, type);
    put_be16(s, 4);
    put_be32(s, value);
}

static void send_script(struct script *s, int fd)
{
    send_all(fd, s->bytes, s->size);
    script_free(s);
}

/* --- the source's end ---------------------------------------------------- */

/* One request serves its pages at once, and the next message is the caller's.
 */
static void serve(bool preempt)
{
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };

    fixture_open(&f, preempt);
    pattern_fill(f.guest.memory[0] + 5 * PAGE, 5);
    put_request(&s, "ram", 5 * PAGE, PAGE);
    put_request(&s, NULL, 6 * PAGE, 2 * PAGE);
    put_request(&s, NULL, 5 * PAGE, PAGE); /* sent already */
    put_request(&s, "huge", HUGE, HUGE);
    put_request(&s, "ram", 0, PAGE);
    put_word(&s, PONG, 3);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    CHECK_EQ(m.type, PONG);
    CHECK_EQ(m.length, 4);
    CHECK_EQ(wire_get_be32(m.payload), 3);
    CHECK_EQ(f.source.stats.requests, 5);
    CHECK_EQ(f.source.stats.requests_late, 1);
    CHECK_EQ(f.source.stats.urgent_pages, 4 + 512);
    CHECK_EQ(f.source.stats.urgent_on_preempt, preempt ? 4 + 512 : 0);
    CHECK_EQ(f.source.stats.normal_pages, 1);
    CHECK_EQ(f.source.stats.send.count, 5);
    CHECK_EQ(source_owed_pages(&f.source), 12 + 512);
    CHECK_EQ(is_readable(f.preempt.peer), preempt);
    CHECK_EQ(is_readable(f.main.peer), !preempt);
    fixture_close(&f);
}

/* The line is known to carry 16 pages in no time. */
static void know_fast_line(struct source *s)
{
    uint32_t number = flow_probe(&s->flow, clock_ns());

    NEED(flow_answer_untrusted(&s->flow, number, clock_ns()));
    s->flow.window = MIB;
}

/* Requests that come close together bring what lies behind the second one. */
static void test_neighbours(void)
{
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };

    fixture_open(&f, true);
    know_fast_line(&f.source);
    put_request(&s, "ram", 3 * PAGE, PAGE);
    put_request(&s, NULL, 5 * PAGE, PAGE);
    put_request(&s, NULL, 9 * PAGE, PAGE);
    put_word(&s, SHUT, 0);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    CHECK_EQ(m.type, SHUT);
    CHECK_EQ(f.source.stats.urgent_pages, 1 + 11);
    CHECK_EQ(f.source.stats.neighbour_pages, 10);
    CHECK_EQ(f.source.stats.requests_late, 1);
    CHECK_EQ(bitmap_next_set(&f.guest.ram.blocks[0].owed, 3), 4);
    CHECK_EQ(bitmap_next_set(&f.guest.ram.blocks[0].owed, 5), 16);
    fixture_close(&f);
}

/* A line of which nothing is known yet, and a shared one, bring none. */
static void test_no_neighbours(void)
{
    for (int shared = 0; shared < 2; shared++) {
        struct fixture f;
        struct rp_message m;
        struct script s = { 0 };

        fixture_open(&f, !shared);
        if (shared) {
            know_fast_line(&f.source);
        }
        put_request(&s, "ram", 3 * PAGE, PAGE);
        put_request(&s, NULL, 5 * PAGE, PAGE);
        put_word(&s, SHUT, 0);
        send_script(&s, f.main.peer);
        CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
        CHECK_EQ(f.source.stats.urgent_pages, 2);
        CHECK_EQ(f.source.stats.neighbour_pages, 0);
        fixture_close(&f);
    }
}

static void test_serve_on_main(void)
{
    serve(false);
}

static void test_serve_on_preempt(void)
{
    serve(true);
}

/* The very bytes: a part on main; bare records, one CONTINUE, on preempt. */
static void test_bytes_on_main(void)
{
    static const uint8_t wanted[] = {
        2,    0,    0, 0,    SECTION, 0,   0, 0, 0,       0, 0,
        0x30, 0x02, 3, 'r',  'a',     'm', 0, 0, 0,       0, 0,
        0,    0,    0, 0x10, 0x7e,    0,   0, 0, SECTION,
    };
    uint8_t got[sizeof(wanted)];
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };

    fixture_open(&f, false);
    put_request(&s, "ram", 3 * PAGE, PAGE);
    put_word(&s, SHUT, 0);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    receive_all(f.main.peer, got, sizeof(got));
    CHECK_BYTES(got, wanted, sizeof(wanted));
    CHECK(!is_readable(f.main.peer));
    fixture_close(&f);
}

static void test_bytes_on_preempt(void)
{
    static const uint8_t wanted[] = {
        0,   0, 0, 0, 0, 0, 0x30, 0x02, 3,    'r',  'a',
        'm', 0, 0, 0, 0, 0, 0,    0,    0x10, 0x22, 0,
    };
    uint8_t got[sizeof(wanted)];
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };

    fixture_open(&f, true);
    put_request(&s, "ram", 3 * PAGE, PAGE);
    put_request(&s, NULL, PAGE, PAGE);
    put_word(&s, SHUT, 0);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    receive_all(f.preempt.peer, got, sizeof(got));
    CHECK_BYTES(got, wanted, sizeof(wanted));
    CHECK(!is_readable(f.preempt.peer));
    fixture_close(&f);
}

static struct result answer_to(const struct script *s)
{
    struct fixture f;
    struct rp_message m;
    struct result r;

    fixture_open(&f, true);
    send_all(f.main.peer, s->bytes, s->size);
    line_hang_up(&f.main);
    r = rpath_run(&f.source, &m);
    fixture_close(&f);
    return r;
}

static bool request_refused(const char *idstr, uint64_t start, uint32_t length,
                            const char *why)
{
    struct script s = { 0 };
    struct result r;

    put_request(&s, "ram", 0, PAGE);
    put_request(&s, idstr, start, length);
    r = answer_to(&s);
    script_free(&s);
    return CHECK_SOFT(r.kind == RESULT_STREAM) &&
           CHECK_SOFT(strstr(r.what, why));
}

static void test_refused_requests(void)
{
    CHECK(request_refused("rom", 0, PAGE, "not here"));
    CHECK(request_refused("", 0, PAGE, "not here"));
    CHECK(request_refused(NULL, 1, PAGE, "not within"));
    CHECK(request_refused(NULL, 0, 1, "not within"));
    CHECK(request_refused(NULL, 0, 0, "not within"));
    CHECK(request_refused(NULL, 16 * PAGE, PAGE, "not within"));
    CHECK(request_refused(NULL, 15 * PAGE, 2 * PAGE, "not within"));
    CHECK(request_refused(NULL, ~(PAGE - 1), PAGE, "not within"));
    CHECK(request_refused("huge", PAGE, HUGE, "not within"));
    CHECK(request_refused("huge", 0, PAGE, "not within"));
    CHECK(request_refused("huge", HUGE, 2 * HUGE, "not within"));
}

static bool message_refused(uint16_t type, const void *payload, uint16_t length,
                            const char *why)
{
    struct script s = { 0 };
    struct result r;

    put_be16(&s, type);
    put_be16(&s, length);
    put_bytes(&s, payload, length);
    r = answer_to(&s);
    script_free(&s);
    return CHECK_SOFT(r.kind == RESULT_STREAM) &&
           CHECK_SOFT(strstr(r.what, why));
}

static void test_refused_messages(void)
{
    static const uint8_t request[600] = { 0, 0, 0,    0, 0, 0,   0,   0,
                                          0, 0, 0x10, 0, 3, 'r', 'a', 'm' };

    CHECK(message_refused(4, request, 12, "not here")); /* no predecessor */
    CHECK(message_refused(4, request, 13, "not here"));
    CHECK(message_refused(4, request, 11, "too short"));
    CHECK(message_refused(3, request, 0, "too short"));
    CHECK(message_refused(3, request, 12, "not here"));
    CHECK(message_refused(3, request, 15, "not here")); /* name is longer */
    CHECK(message_refused(3, request, 17, "not here")); /* name is shorter */
    CHECK(message_refused(1, request, RP_PAYLOAD_MAX + 1, "too long"));
    CHECK(message_refused(3, request, RP_PAYLOAD_MAX + 1, "too long"));
}

static void test_longest_message(void)
{
    uint8_t payload[RP_PAYLOAD_MAX] = { 1, 2, 3 };
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };

    fixture_open(&f, true);
    payload[RP_PAYLOAD_MAX - 1] = 9;
    put_be16(&s, 77);
    put_be16(&s, RP_PAYLOAD_MAX);
    put_bytes(&s, payload, sizeof(payload));
    put_be16(&s, 7);
    put_be16(&s, 0);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    CHECK_EQ(m.type, 77);
    CHECK_BYTES(m.payload, payload, sizeof(payload));
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    CHECK_EQ(m.type, 7);
    CHECK_EQ(m.length, 0);
    fixture_close(&f);
}

static void test_every_cut(void)
{
    struct script s = { 0 };

    put_request(&s, "ram", PAGE, PAGE);
    put_word(&s, PONG, 1);
    for (size_t full = s.size; s.size > 0; s.size--) {
        CHECK_EQ(answer_to(&s).kind,
                 s.size == full ? RESULT_OK : RESULT_CLOSED);
    }
    script_free(&s);
}

static struct result run_rpath(void *arg)
{
    struct rp_message m;

    return rpath_run(arg, &m);
}

static void test_stop(void)
{
    struct fixture f;
    struct job job;

    fixture_open(&f, true);
    job_start(&job, run_rpath, &f.source);
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    fixture_close(&f);
}

static void test_preempt_closed_early(void)
{
    struct fixture f;
    struct job job;
    struct result r;

    fixture_open(&f, true);
    job_start(&job, run_rpath, &f.source);
    line_hang_up(&f.preempt);
    r = job_wait(&job);
    CHECK_EQ(r.kind, RESULT_CLOSED);
    CHECK_TEXT(r.what, "preempt channel");
    fixture_close(&f);
}

/* After EOF the destination closes it first, and then says SHUT. */
static void test_preempt_closed_after_the_end(void)
{
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };
    struct job job;

    fixture_open(&f, true);
    __atomic_store_n(&f.source.ended, 1, __ATOMIC_SEQ_CST);
    job_start(&job, run_rpath, &f.source);
    line_hang_up(&f.preempt);
    put_word(&s, SHUT, 0);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(job_wait(&job)));
    /* And once more with everything there before it looks. */
    put_word(&s, SHUT, 0);
    send_script(&s, f.main.peer);
    CHECK(RESULT_IS_OK(rpath_run(&f.source, &m)));
    CHECK_EQ(m.type, SHUT);
    fixture_close(&f);
}

/* A request that cannot be answered ends the loop. */
static void test_write_fails(void)
{
    struct fixture f;
    struct rp_message m;
    struct script s = { 0 };
    struct result r;

    fixture_open(&f, true);
    put_request(&s, "ram", 0, PAGE);
    send_script(&s, f.main.peer);
    line_hang_up(&f.preempt);
    r = rpath_run(&f.source, &m);
    CHECK(r.kind == RESULT_CHANNEL || r.kind == RESULT_CLOSED);
    fixture_close(&f);
}

/* --- the destination's end ----------------------------------------------- */

static bool sent(struct line *l, const struct script *wanted)
{
    uint8_t got[600];

    NEED(wanted->size <= sizeof(got));
    receive_all(l->peer, got, wanted->size);
    return memcmp(got, wanted->bytes, wanted->size) == 0 &&
           !is_readable(l->peer);
}

static void test_requests_of_the_destination(void)
{
    struct rpath rp;
    struct guest g;
    struct line l;
    struct script s = { 0 };
    const struct ram_block *ram;
    const struct ram_block *huge;

    guest_open(&g, specs, 2);
    ram = &g.ram.blocks[0];
    huge = &g.ram.blocks[1];
    line_open(&l);
    rpath_open(&rp);
    CHECK(RESULT_IS_OK(rpath_request(&rp, ram, 0, PAGE)));
    CHECK_EQ(rp.requests, 0);
    rpath_connect(&rp, &l.channel);
    CHECK(RESULT_IS_OK(rpath_request(&rp, ram, 0, PAGE)));
    CHECK(RESULT_IS_OK(rpath_request(&rp, ram, 3 * PAGE, PAGE)));
    CHECK(RESULT_IS_OK(rpath_request(&rp, huge, HUGE, HUGE)));
    CHECK(RESULT_IS_OK(rpath_request(&rp, ram, PAGE, PAGE)));
    put_request(&s, "ram", 0, PAGE);
    put_request(&s, NULL, 3 * PAGE, PAGE);
    put_request(&s, "huge", HUGE, HUGE);
    put_request(&s, "ram", PAGE, PAGE);
    CHECK(sent(&l, &s));
    script_free(&s);
    /* A new connection knows no block. */
    rpath_connect(&rp, NULL);
    CHECK(RESULT_IS_OK(rpath_request(&rp, ram, PAGE, PAGE)));
    rpath_connect(&rp, &l.channel);
    CHECK(RESULT_IS_OK(rpath_request(&rp, ram, PAGE, PAGE)));
    put_request(&s, "ram", PAGE, PAGE);
    CHECK(sent(&l, &s));
    script_free(&s);
    CHECK_EQ(rp.requests, 5);
    line_hang_up(&l);
    CHECK_EQ(rpath_request(&rp, ram, 0, PAGE).kind, RESULT_CHANNEL);
    rpath_close(&rp);
    line_close(&l);
    guest_close(&g);
}

#define REQUESTS 500

struct asker {
    struct rpath *rp;
    const struct ram_block *block;
};

static struct result ask(void *arg)
{
    struct asker *a = arg;
    struct result r = result_ok();

    for (int i = 0; i < REQUESTS && RESULT_IS_OK(r); i++) {
        r = rpath_request(a->rp, a->block, 0, a->block->page_size);
    }
    return r;
}

/* The unnamed form always means the block it was sent for. */
static void test_requests_of_two_threads(void)
{
    struct fixture f;
    struct rpath rp;
    struct channel c;
    struct job server;
    struct job jobs[2];
    struct asker askers[2];
    struct script s = { 0 };
    int stop = make_event();

    fixture_open(&f, true);
    NEED(RESULT_IS_OK(channel_open(&c, f.main.peer, stop)));
    rpath_open(&rp);
    rpath_connect(&rp, &c);
    job_start(&server, run_rpath, &f.source);
    for (uint32_t i = 0; i < 2; i++) {
        askers[i] = (struct asker){ &rp, &f.guest.ram.blocks[i] };
        job_start(&jobs[i], ask, &askers[i]);
    }
    for (uint32_t i = 0; i < 2; i++) {
        CHECK(RESULT_IS_OK(job_wait(&jobs[i])));
    }
    put_word(&s, PONG, 0);
    CHECK(RESULT_IS_OK(channel_write(&c, s.bytes, s.size)));
    script_free(&s);
    CHECK(RESULT_IS_OK(job_wait(&server)));
    CHECK_EQ(f.source.stats.requests, 2 * REQUESTS);
    CHECK_EQ(f.source.stats.requests_late, 2 * REQUESTS - 2);
    rpath_close(&rp);
    channel_close(&c);
    close(stop);
    fixture_close(&f);
}

int main(void)
{
    RUN(test_neighbours);
    RUN(test_no_neighbours);
    RUN(test_serve_on_main);
    RUN(test_serve_on_preempt);
    RUN(test_bytes_on_main);
    RUN(test_bytes_on_preempt);
    RUN(test_refused_requests);
    RUN(test_refused_messages);
    RUN(test_longest_message);
    RUN(test_every_cut);
    RUN(test_stop);
    RUN(test_preempt_closed_early);
    RUN(test_preempt_closed_after_the_end);
    RUN(test_write_fails);
    RUN(test_requests_of_the_destination);
    RUN(test_requests_of_two_threads);
    return check_status();
}
