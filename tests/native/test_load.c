#include "load.h"

#include "check.h"
#include "fault.h"
#include "support.h"
#include "uffd.h"

#include <sys/socket.h>
#include <unistd.h>

#define SECTION 5
#define PAGES 64
#define BIG (4 * PAGE) /* a "huge" page that needs no hugetlbfs */
#define PER_BIG 4

static const struct block_spec small_specs[] = {
    { .idstr = "ram", .length = PAGES * PAGE, .page_size = PAGE },
    { .idstr = "vga", .length = 3 * PAGE, .page_size = PAGE },
};
static const struct block_spec big_specs[] = {
    { .idstr = "ram", .length = 8 * BIG, .page_size = BIG, .plain = true },
    { .idstr = "vga", .length = 3 * PAGE, .page_size = PAGE },
};
static const struct block_spec huge_specs[] = {
    { .idstr = "ram", .length = 3 * HUGE, .page_size = HUGE },
};

/* Two channels and their loaders; a guest that nobody runs, unless asked. */
struct fixture {
    struct guest guest;
    struct destination d;
    struct line main;
    struct line preempt;
    struct loader loader;
    struct loader urgent;
    int uffd;
};

static void fixture_open(struct fixture *f, const struct block_spec *specs,
                         uint32_t count, int way)
{
    guest_open(&f->guest, specs, count);
    NEED(RESULT_IS_OK(ram_prepare_destination(&f->guest.ram, -1)));
    f->uffd = way == PLACE_FILE ? -1 : open_ready_uffd();
    NEED(RESULT_IS_OK(
        destination_open(&f->d, &f->guest.ram, way, f->uffd, NULL, 0)));
    line_open(&f->main);
    line_open(&f->preempt);
    NEED(RESULT_IS_OK(loader_open(&f->loader, &f->d, &f->main.channel, false)));
    NEED(RESULT_IS_OK(
        loader_open(&f->urgent, &f->d, &f->preempt.channel, true)));
    f->loader.section_id = SECTION;
}

static void fixture_close(struct fixture *f)
{
    loader_close(&f->loader);
    loader_close(&f->urgent);
    line_close(&f->main);
    line_close(&f->preempt);
    destination_close(&f->d);
    if (f->uffd >= 0) {
        close(f->uffd);
    }
    guest_close(&f->guest);
}

/* The connection breaks, and there are new channels. */
static void reconnect(struct fixture *f)
{
    loader_close(&f->loader);
    loader_close(&f->urgent);
    line_close(&f->main);
    line_close(&f->preempt);
    line_open(&f->main);
    line_open(&f->preempt);
    NEED(RESULT_IS_OK(loader_open(&f->loader, &f->d, &f->main.channel, false)));
    NEED(RESULT_IS_OK(
        loader_open(&f->urgent, &f->d, &f->preempt.channel, true)));
    f->loader.section_id = SECTION;
}

static struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

static uint8_t *at(struct fixture *f, uint32_t i, uint64_t page)
{
    return f->guest.memory[i] + page * PAGE;
}

static struct result run_main(void *arg)
{
    return load_main(arg);
}

static struct result run_preempt(void *arg)
{
    return load_preempt(arg);
}

/* Load what the script says while somebody sends it; frees the script. */
static struct result play(struct line *line, struct loader *loader,
                          struct result (*run)(void *), struct script *s)
{
    struct job job;
    struct result r;

    job_start(&job, run, loader);
    send_all(line->peer, s->bytes, s->size);
    shutdown(line->peer, SHUT_WR);
    r = job_wait(&job);
    script_free(s);
    return r;
}

static struct result play_main(struct fixture *f, struct script *s)
{
    return play(&f->main, &f->loader, run_main, s);
}

static struct result play_preempt(struct fixture *f, struct script *s)
{
    return play(&f->preempt, &f->urgent, run_preempt, s);
}

/* --- sections ------------------------------------------------------------ */

static void test_sections(void)
{
    struct fixture f;
    struct script s = { 0 };
    uint8_t byte;

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", 3 * PAGE, 3);
    put_page(&s, NULL, 4 * PAGE, 4);
    put_page(&s, NULL, 9 * PAGE, 9);
    put_zero(&s, NULL, 10 * PAGE);
    put_end_of_section(&s, SECTION);
    put_section(&s, SECTION_PART, SECTION); /* without a page */
    put_end_of_section(&s, SECTION);
    put_section(&s, SECTION_END, SECTION);
    put_page(&s, NULL, 5 * PAGE, 5); /* the block is remembered */
    put_page(&s, "vga", 2 * PAGE, 22);
    put_be64(&s, RAM_SAVE_FLAG_MULTIFD_FLUSH);
    put_page(&s, "ram", 3 * PAGE, 33); /* again: the last one wins */
    put_end_of_section(&s, SECTION);
    put_byte(&s, 0x04);
    CHECK(RESULT_IS_OK(play_main(&f, &s)));
    CHECK_EQ(f.loader.next, 0x04);
    CHECK_EQ(f.loader.ended, 1);
    CHECK(RESULT_IS_OK(channel_read(&f.main.channel, &byte, 1)));
    CHECK_EQ(byte, 0x04);
    CHECK(pattern_is(at(&f, 0, 3), 33));
    CHECK(pattern_is(at(&f, 0, 4), 4));
    CHECK(pattern_is(at(&f, 0, 5), 5));
    CHECK(pattern_is(at(&f, 0, 9), 9));
    CHECK(is_all_zero(at(&f, 0, 10)));
    CHECK(pattern_is(at(&f, 1, 2), 22));
    CHECK_EQ(bitmap_count(&block(&f, 0)->received), 5);
    CHECK_EQ(bitmap_count(&block(&f, 1)->received), 1);
    CHECK_EQ(f.d.stats.precopy_pages, 7);
    CHECK_EQ(f.d.stats.zero_pages, 1);
    CHECK_EQ(f.d.stats.postcopy_pages, 0);
    fixture_close(&f);
}

/* More than the channel's buffer, in runs longer than one step. */
static void test_a_long_section(void)
{
    static const struct block_spec specs[] = {
        { .idstr = "ram", .length = 8 * MIB, .page_size = PAGE },
    };
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, specs, 1, PLACE_FILE);
    put_section(&s, SECTION_PART, SECTION);
    for (uint64_t p = 0; p < 2048; p++) {
        put_page(&s, p ? NULL : "ram", p * PAGE, p);
    }
    put_end_of_section(&s, SECTION);
    put_byte(&s, 0);
    CHECK(RESULT_IS_OK(play_main(&f, &s)));
    for (uint64_t p = 0; p < 2048; p++) {
        CHECK(pattern_is(at(&f, 0, p), p));
    }
    fixture_close(&f);
}

/* A page must not wait for the record behind it. */
static void test_a_page_is_placed_when_it_is_here(void)
{
    struct fixture f;
    struct script s = { 0 };
    struct job job;

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    job_start(&job, run_preempt, &f.urgent);
    put_page(&s, "ram", 3 * PAGE, 3);
    put_page(&s, NULL, 4 * PAGE, 4);
    /* Down to the byte: the second one lacks its last. */
    send_all(f.preempt.peer, s.bytes, s.size - 1);
    while (!bitmap_test(&block(&f, 0)->received, 3)) {
    }
    CHECK(pattern_is(at(&f, 0, 3), 3));
    CHECK(!bitmap_test(&block(&f, 0)->received, 4));
    send_all(f.preempt.peer, s.bytes + s.size - 1, 1);
    while (!bitmap_test(&block(&f, 0)->received, 4)) {
    }
    set_event(f.preempt.stop_fd);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    script_free(&s);
    fixture_close(&f);
}

/* Cut anywhere: what was whole is placed, and the end is told apart. */
static void test_every_cut(void)
{
    struct script s = { 0 };
    size_t first;

    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", 3 * PAGE, 3);
    first = s.size;
    put_zero(&s, NULL, 4 * PAGE);
    put_end_of_section(&s, SECTION);
    for (size_t cut = 0; cut <= s.size; cut++) {
        struct fixture f;
        struct script part = { 0 };

        if (cut > 30 && cut < first - 2) {
            continue; /* in the page's data: one place is like another */
        }
        fixture_open(&f, small_specs, 2, PLACE_FILE);
        put_bytes(&part, s.bytes, cut);
        CHECK_EQ(play_main(&f, &part).kind, RESULT_CLOSED);
        CHECK_EQ(bitmap_test(&block(&f, 0)->received, 3), cut >= first);
        CHECK_EQ(channel_position(&f.main.channel) <= cut, 1);
        fixture_close(&f);
    }
    script_free(&s);
}

static bool refused(const struct block_spec *specs, struct script *s,
                    const char *why)
{
    struct fixture f;
    struct result r;

    fixture_open(&f, specs, 2, PLACE_FILE);
    if (specs == big_specs) {
        NEED(RESULT_IS_OK(destination_listen(&f.d)));
    }
    r = play_main(&f, s);
    fixture_close(&f);
    return CHECK_SOFT(r.kind == RESULT_STREAM) &&
           CHECK_SOFT(strstr(r.what, why));
}

static void test_refusals(void)
{
    struct script s = { 0 };

    put_section(&s, SECTION_PART, SECTION + 1);
    CHECK(refused(small_specs, &s, "was not started"));

    put_section(&s, SECTION_PART, SECTION);
    put_end_of_section(&s, SECTION + 1);
    CHECK(refused(small_specs, &s, "footer of another"));

    put_section(&s, SECTION_PART, SECTION);
    put_be64(&s, RAM_SAVE_FLAG_EOS);
    put_byte(&s, SECTION_PART);
    CHECK(refused(small_specs, &s, "without its footer"));

    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, NULL, 0, 0);
    CHECK(refused(small_specs, &s, "name its block"));

    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", PAGES * PAGE, 0);
    CHECK(refused(small_specs, &s, "past the end"));

    put_section(&s, SECTION_PART, SECTION);
    put_be64(&s, RAM_SAVE_FLAG_XBZRLE);
    CHECK(refused(small_specs, &s, "flags"));

    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", 0, 0);
    put_page(&s, "ram", BIG, 0);
    CHECK(refused(big_specs, &s, "interrupted by another"));

    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", 0, 0);
    put_end_of_section(&s, SECTION);
    CHECK(refused(big_specs, &s, "interrupted by the end"));
}

static void test_stop(void)
{
    struct fixture f;
    struct job job;

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    job_start(&job, run_main, &f.loader);
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&job).kind, RESULT_STOPPED);
    fixture_close(&f);
}

static void test_preempt_ends(void)
{
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    put_page(&s, "ram", 3 * PAGE, 3);
    put_be64(&s, RAM_SAVE_FLAG_EOS);
    CHECK(RESULT_IS_OK(play_preempt(&f, &s)));
    CHECK_EQ(load_preempt(&f.urgent).kind, RESULT_CLOSED);
    CHECK(pattern_is(at(&f, 0, 3), 3));
    fixture_close(&f);
}

/* --- discards ------------------------------------------------------------ */

static void put_discard(struct script *s, const char *idstr, uint64_t start,
                        uint64_t length)
{
    put_byte(s, 0x08);
    put_be16(s, 6);
    put_be16(s, (uint16_t)(3 + strlen(idstr) + 16));
    put_byte(s, 0);
    put_name(s, idstr);
    put_byte(s, 0);
    put_be64(s, start);
    put_be64(s, length);
}

static void test_discards(void)
{
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    f.loader.advised = 1;
    put_section(&s, SECTION_PART, SECTION);
    for (uint64_t p = 0; p < PAGES; p++) {
        put_zero(&s, "ram", p * PAGE);
    }
    put_end_of_section(&s, SECTION);
    put_discard(&s, "ram", 2 * PAGE, 3 * PAGE);
    put_discard(&s, "ram", (PAGES - 1) * PAGE, PAGE);
    put_discard(&s, "vga", 0, 3 * PAGE);
    put_byte(&s, 0x08); /* PING: not ours */
    put_be16(&s, 2);
    put_be16(&s, 4);
    put_be32(&s, 2);
    CHECK(RESULT_IS_OK(play_main(&f, &s)));
    CHECK_EQ(f.loader.next, 0x08);
    CHECK_EQ(channel_buffered(&f.main.channel), 9);
    CHECK_EQ(f.loader.discards, 3);
    CHECK_EQ(bitmap_count(&block(&f, 0)->received), PAGES - 4);
    CHECK(!bitmap_test(&block(&f, 0)->received, 4));
    CHECK(bitmap_test(&block(&f, 0)->received, 5));
    fixture_close(&f);
}

/* Nobody runs on it: a hole that was never sent is not waited for. */
static void test_what_is_owed_to_a_file(void)
{
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    f.loader.advised = 1;
    CHECK_EQ(f.loader.begun, 0);
    put_section(&s, SECTION_PART, SECTION);
    for (uint64_t p = 0; p < 10; p++) {
        put_page(&s, "ram", p * PAGE, p);
    }
    put_end_of_section(&s, SECTION);
    put_discard(&s, "ram", 2 * PAGE, 3 * PAGE);
    put_discard(&s, "ram", 20 * PAGE, PAGE);
    CHECK_EQ(play_main(&f, &s).kind, RESULT_CLOSED);
    CHECK_EQ(f.loader.begun, 1);
    CHECK_EQ(f.loader.ended, 0);
    CHECK(pattern_is(at(&f, 0, 1), 1));
    CHECK(is_all_zero(at(&f, 0, 3)));
    CHECK(!bitmap_test(&block(&f, 0)->populated, 3));
    f.d.unsent_is_hole = 1;
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 4);
    CHECK(bitmap_test(&block(&f, 1)->received, 0));
    CHECK(!bitmap_test(&block(&f, 0)->received, 20));
    fixture_close(&f);
}

static bool discard_refused(const char *idstr, uint64_t start, uint64_t length,
                            bool advised)
{
    struct fixture f;
    struct script s = { 0 };
    struct result r;

    fixture_open(&f, big_specs, 2, PLACE_FILE);
    f.loader.advised = advised;
    put_discard(&s, idstr, start, length);
    r = play_main(&f, &s);
    fixture_close(&f);
    return CHECK_SOFT(r.kind == RESULT_STREAM) &&
           CHECK_SOFT(strstr(r.what, "discard"));
}

/* A discard's payload of which the whole length was `bytes`. */
static bool payload_refused(const void *bytes, uint16_t size)
{
    struct fixture f;
    struct script s = { 0 };
    struct result r;

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    f.loader.advised = 1;
    put_byte(&s, 0x08);
    put_be16(&s, 6);
    put_be16(&s, size);
    put_bytes(&s, bytes, size);
    r = play_main(&f, &s);
    fixture_close(&f);
    return CHECK_SOFT(r.kind == RESULT_STREAM) &&
           CHECK_SOFT(strstr(r.what, "discard"));
}

static void test_refused_discards(void)
{
    static const uint8_t good[] = {
        0, 3, 'r', 'a', 'm', 0, 0, 0, 0, 0,    0,
        0, 0, 0,   0,   0,   0, 0, 0, 0, 0x10, 0,
    };
    uint8_t bad[sizeof(good)];

    CHECK(discard_refused("ram", 0, BIG, false));
    CHECK(discard_refused("rom", 0, BIG, true));
    CHECK(discard_refused("", 0, BIG, true));
    CHECK(discard_refused("ram", PAGE, BIG, true));
    CHECK(discard_refused("ram", 0, PAGE, true));
    CHECK(discard_refused("ram", 0, 0, true));
    CHECK(discard_refused("ram", 8 * BIG, BIG, true));
    CHECK(discard_refused("ram", 7 * BIG, 2 * BIG, true));
    CHECK(discard_refused("ram", BIG, ~(BIG - 1), true));
    for (uint16_t size = 0; size < sizeof(good); size++) {
        CHECK(payload_refused(good, size));
    }
    memcpy(bad, good, sizeof(good));
    bad[0] = 1; /* version */
    CHECK(payload_refused(bad, sizeof(bad)));
    bad[0] = 0;
    bad[5] = 1; /* terminator */
    CHECK(payload_refused(bad, sizeof(bad)));
    bad[5] = 0;
    bad[1] = 255; /* a name longer than the payload */
    CHECK(payload_refused(bad, sizeof(bad)));
}

/* --- postcopy ------------------------------------------------------------ */

/* Twice, on one channel and on the other: the first stays, untouched. */
static void test_duplicates(void)
{
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, small_specs, 2, PLACE_FILE);
    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", 10 * PAGE, 10);
    put_end_of_section(&s, SECTION);
    send_all(f.main.peer, s.bytes, s.size);
    send_all(f.main.peer, "", 1);
    script_free(&s);
    CHECK(RESULT_IS_OK(load_main(&f.loader)));
    channel_consume(&f.main.channel, 1);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), PAGES + 3 - 1);
    put_page(&s, "ram", 12 * PAGE, 12);
    CHECK_EQ(play_preempt(&f, &s).kind, RESULT_CLOSED);
    pattern_fill(at(&f, 0, 12), 77); /* the guest runs */
    put_section(&s, SECTION_PART, SECTION);
    for (uint64_t p = 8; p < 16; p++) { /* 10 and 12 are here already */
        put_page(&s, "ram", p * PAGE, 100 + p);
    }
    put_zero(&s, NULL, 12 * PAGE);
    put_end_of_section(&s, SECTION);
    CHECK_EQ(play_main(&f, &s).kind, RESULT_CLOSED);
    CHECK(pattern_is(at(&f, 0, 10), 10));
    CHECK(pattern_is(at(&f, 0, 12), 77));
    for (uint64_t p = 8; p < 16; p++) {
        CHECK(p == 10 || p == 12 || pattern_is(at(&f, 0, p), 100 + p));
    }
    CHECK_EQ(destination_missing(&f.d), PAGES + 3 - 8);
    CHECK_EQ(f.d.stats.duplicate_pages, 3);
    CHECK_EQ(f.d.stats.preempt_pages, 1);
    CHECK_EQ(f.d.stats.postcopy_pages, 1 + 9);
    CHECK_EQ(f.d.stats.precopy_pages, 1);
    fixture_close(&f);
}

/* Host pages of which some target pages are zero, over what was there. */
static void put_big(struct script *s, uint64_t host, uint64_t seed)
{
    for (uint64_t i = 0; i < PER_BIG; i++) {
        if (i % 2) {
            put_zero(s, "ram", host * BIG + i * PAGE);
        } else {
            put_page(s, "ram", host * BIG + i * PAGE, seed + i);
        }
    }
}

static bool big_is(struct fixture *f, uint64_t host, uint64_t seed)
{
    bool ok = true;

    for (uint64_t i = 0; i < PER_BIG; i++) {
        const uint8_t *page = at(f, 0, host * PER_BIG + i);

        ok = ok && (i % 2 ? is_all_zero(page) : pattern_is(page, seed + i));
    }
    return ok;
}

static void test_host_pages(void)
{
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, big_specs, 2, PLACE_FILE);
    f.loader.advised = 1;
    put_section(&s, SECTION_PART, SECTION);
    for (uint64_t p = 0; p < 2 * PER_BIG; p++) { /* stale soon */
        put_page(&s, "ram", p * PAGE, 900);
    }
    put_end_of_section(&s, SECTION);
    put_discard(&s, "ram", 0, 2 * BIG);
    put_byte(&s, 0);
    send_all(f.main.peer, s.bytes, s.size);
    script_free(&s);
    CHECK(RESULT_IS_OK(load_main(&f.loader)));
    channel_consume(&f.main.channel, 1);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    CHECK_EQ(destination_missing(&f.d), 8 + 3);

    put_big(&s, 1, 10);
    put_big(&s, 3, 30);
    put_be64(&s, RAM_SAVE_FLAG_EOS);
    CHECK(RESULT_IS_OK(play_preempt(&f, &s)));
    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "vga", 0, 1);
    put_big(&s, 3, 99); /* is here */
    put_big(&s, 2, 20);
    for (uint64_t i = 0; i < PER_BIG; i++) { /* stale, and zero now */
        put_zero(&s, "ram", i * PAGE);
    }
    put_end_of_section(&s, SECTION);
    CHECK_EQ(play_main(&f, &s).kind, RESULT_CLOSED);
    CHECK(big_is(&f, 1, 10));
    CHECK(big_is(&f, 2, 20));
    CHECK(big_is(&f, 3, 30));
    CHECK(is_all_zero(at(&f, 0, 0)));
    CHECK(is_all_zero(at(&f, 0, 3)));
    CHECK_EQ(destination_missing(&f.d), 4 + 2);
    CHECK_EQ(f.d.stats.duplicate_pages, PER_BIG);
    fixture_close(&f);
}

/*
 * A connection that breaks in a host page leaves nothing of it: it is missing
 * as before, and the next connection brings it.
 */
static void interrupted(int way, const struct block_spec *specs, bool preempt)
{
    struct fixture f;
    struct script s = { 0 };
    uint64_t per_host = specs[0].page_size / PAGE;
    uint64_t hosts;

    fixture_open(&f, specs, 1, way);
    hosts = block_hosts(block(&f, 0));
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    if (!preempt) {
        put_section(&s, SECTION_PART, SECTION);
    }
    for (uint64_t i = 0; i + 1 < per_host; i++) {
        put_page(&s, "ram", (per_host + i) * PAGE, 900 + i);
    }
    CHECK_EQ((preempt ? play_preempt(&f, &s) : play_main(&f, &s)).kind,
             RESULT_CLOSED);
    CHECK_EQ(destination_missing(&f.d), hosts);
    CHECK_EQ(bitmap_count(&block(&f, 0)->received), 0);

    reconnect(&f);
    put_section(&s, SECTION_PART, SECTION);
    for (uint64_t i = 0; i < per_host; i++) {
        if (i % 2) {
            put_zero(&s, "ram", (per_host + i) * PAGE);
        } else {
            put_page(&s, "ram", (per_host + i) * PAGE, 10 + i);
        }
    }
    put_end_of_section(&s, SECTION);
    CHECK_EQ(play_main(&f, &s).kind, RESULT_CLOSED);
    CHECK_EQ(f.d.stats.duplicate_pages, 0);
    CHECK_EQ(destination_missing(&f.d), hosts - 1);
    for (uint64_t i = 0; i < per_host; i++) {
        CHECK(i % 2 ? is_all_zero(at(&f, 0, per_host + i)) :
                      pattern_is(at(&f, 0, per_host + i), 10 + i));
    }
    if (way != PLACE_FILE) {
        CHECK(RESULT_IS_OK(destination_finish(&f.d)));
    }
    fixture_close(&f);
}

static void test_interrupted_host_page(void)
{
    interrupted(PLACE_FILE, big_specs, false);
    interrupted(PLACE_FILE, big_specs, true);
    if (have_huge_pages()) {
        interrupted(PLACE_CONTINUE, huge_specs, true);
        interrupted(PLACE_COPY, huge_specs, true);
    } else {
        fprintf(stderr, "no huge pages: not tested\n");
    }
}

/* A second copy that breaks off does not take the first one's claim away. */
static void test_interrupted_duplicate(void)
{
    struct fixture f;
    struct script s = { 0 };

    fixture_open(&f, big_specs, 2, PLACE_FILE);
    CHECK(RESULT_IS_OK(destination_listen(&f.d)));
    put_big(&s, 1, 10);
    CHECK_EQ(play_preempt(&f, &s).kind, RESULT_CLOSED);
    put_section(&s, SECTION_PART, SECTION);
    put_page(&s, "ram", BIG, 900);
    CHECK_EQ(play_main(&f, &s).kind, RESULT_CLOSED);
    reconnect(&f);
    put_big(&s, 1, 20);
    CHECK_EQ(play_preempt(&f, &s).kind, RESULT_CLOSED);
    CHECK(big_is(&f, 1, 10));
    CHECK_EQ(destination_missing(&f.d), 7 + 3);
    fixture_close(&f);
}

int main(void)
{
    int uffd = open_uffd();

    RUN(test_sections);
    RUN(test_a_long_section);
    RUN(test_a_page_is_placed_when_it_is_here);
    RUN(test_every_cut);
    RUN(test_refusals);
    RUN(test_stop);
    RUN(test_preempt_ends);
    RUN(test_discards);
    RUN(test_what_is_owed_to_a_file);
    RUN(test_refused_discards);
    RUN(test_duplicates);
    RUN(test_host_pages);
    RUN(test_interrupted_duplicate);
    if (uffd < 0) {
        return check_skip("userfaultfd is not permitted");
    }
    close(uffd);
    RUN(test_interrupted_host_page);
    return check_status();
}
