#include "rpath.h"

#include "check.h"
#include "support.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define SECTION 7
#define SHUT 1
#define LENGTH (4 * MIB)
#define VGA_PAGES 300

static const struct block_spec blocks[] = {
    { .idstr = "ram", .length = LENGTH, .page_size = PAGE },
    { .idstr = "vga", .length = VGA_PAGES * PAGE, .page_size = PAGE },
};

/* Stored RAM, a source of it, and who reads both channels. */
struct fixture {
    struct guest guest;
    uint32_t *checksums;
    struct stored stored;
    struct source source;
    struct line main;
    struct line preempt;
    struct walker walkers[2];
    struct job readers[2];
};

static uint64_t seed_of(uint32_t block, uint64_t page)
{
    return (uint64_t)(block + 1) << 32 | page;
}

/* Of 64 pages 16 hold data, 16 are written zeroes, the others holes. */
static bool has_data(uint64_t page)
{
    return page % 64 < 16;
}

static bool is_written(uint64_t page)
{
    return page % 64 < 32;
}

static struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

static void fill(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(f, i)); p++) {
            if (has_data(p)) {
                pattern_fill(f->guest.memory[i] + p * PAGE, seed_of(i, p));
            } else if (is_written(p)) {
                memset(f->guest.memory[i] + p * PAGE, 0, PAGE);
            }
        }
    }
}

static void make_checksums(struct fixture *f)
{
    uint64_t regions = checksum_regions(LENGTH);

    f->checksums = calloc(regions + checksum_regions(VGA_PAGES * PAGE),
                          sizeof(*f->checksums));
    NEED(f->checksums);
    for (uint32_t i = 0; i < 2; i++) {
        struct checksum_extent e = { .fd = block(f, i)->fd,
                                     .length = block(f, i)->length };

        NEED(RESULT_IS_OK(
            checksum_file(&e, f->checksums + (i ? regions : 0), -1)));
    }
}

static void fixture_open(struct fixture *f, bool preempt)
{
    guest_open(&f->guest, blocks, 2);
    fill(f);
    make_checksums(f);
    NEED(RESULT_IS_OK(ram_prepare_source(&f->guest.ram)));
    NEED(RESULT_IS_OK(source_open(&f->source, &f->guest.ram, SECTION)));
    NEED(RESULT_IS_OK(stored_open(&f->stored, &f->guest.ram, f->checksums)));
    NEED(RESULT_IS_OK(source_serve(&f->source, &f->stored)));
    line_open(&f->main);
    line_open(&f->preempt);
    source_connect(&f->source, &f->main.channel,
                   preempt ? &f->preempt.channel : &f->main.channel);
    walker_open(&f->walkers[0], f->main.peer, &f->guest.ram, SECTION);
    f->walkers[0].asker = &f->source;
    walker_share(&f->walkers[1], &f->walkers[0], f->preempt.peer);
    for (uint32_t i = 0; i < 2; i++) {
        bitmap_set_range(&block(f, i)->dirty, 0, block(f, i)->dirty.bits);
    }
}

static void start_readers(struct fixture *f)
{
    for (int i = 0; i < 2; i++) {
        job_start(&f->readers[i], walker_run, &f->walkers[i]);
    }
}

static bool finish_readers(struct fixture *f)
{
    line_finish(&f->main);
    line_finish(&f->preempt);
    return (int)RESULT_IS_OK(job_wait(&f->readers[0])) &
           (int)RESULT_IS_OK(job_wait(&f->readers[1]));
}

static void fixture_close(struct fixture *f)
{
    walker_close(&f->walkers[0]);
    line_close(&f->main);
    line_close(&f->preempt);
    stored_close(&f->stored);
    source_close(&f->source);
    guest_close(&f->guest);
    free(f->checksums);
}

static uint32_t times(struct fixture *f, uint32_t i, uint64_t page)
{
    return f->walkers[0].counts[i][page];
}

static uint64_t count(struct fixture *f, bool (*which)(uint64_t page))
{
    uint64_t pages = 0;

    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(f, i)); p++) {
            pages += which(p);
        }
    }
    return pages;
}

static uint64_t all_regions(void)
{
    return checksum_regions(LENGTH) + checksum_regions(VGA_PAGES * PAGE);
}

/* Data came once and is right; zeroes came at most once. */
static bool came_right(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(f, i)); p++) {
            const uint8_t *image = f->walkers[0].images[i] + p * PAGE;

            if (times(f, i, p) > 1 || (has_data(p) && !times(f, i, p)) ||
                (has_data(p) ? !pattern_is(image, seed_of(i, p)) :
                               !is_all_zero(image))) {
                fprintf(stderr, "block %u page %lu\n", i, (unsigned long)p);
                return false;
            }
        }
    }
    return true;
}

static struct result run_precopy(void *arg)
{
    return pump_precopy(arg);
}

static struct result run_postcopy(void *arg)
{
    return pump_postcopy(arg);
}

static struct result run_rpath(void *arg)
{
    struct rp_message m;

    return rpath_run(arg, &m);
}

static void request(struct fixture *f, uint32_t i, uint64_t page)
{
    struct script s = { 0 };

    put_be16(&s, 3);
    put_be16(&s, (uint16_t)(13 + block(f, i)->idstr_length));
    put_be64(&s, page * PAGE);
    put_be32(&s, PAGE);
    put_name(&s, block(f, i)->idstr);
    send_all(f->main.peer, s.bytes, s.size);
    script_free(&s);
}

static void send_shut(struct fixture *f)
{
    static const uint8_t shut[] = { 0, SHUT, 0, 4, 0, 0, 0, 0 };

    send_all(f->main.peer, shut, sizeof(shut));
}

/* All requests until here are served; true if none failed. */
static bool serve(struct fixture *f)
{
    struct job server;

    job_start(&server, run_rpath, &f->source);
    send_shut(f);
    return RESULT_IS_OK(job_wait(&server));
}

static void end(struct fixture *f)
{
    __atomic_store_n(&f->source.ended, 1, __ATOMIC_SEQ_CST);
}

/* --- zeroes -------------------------------------------------------------- */

static bool is_zero(uint64_t page)
{
    return !has_data(page);
}

/* Left out by the scan, sent once to who asks for them, before and after. */
static void zeroes(bool preempt)
{
    struct fixture f;

    fixture_open(&f, preempt);
    f.stored.leave_out_zeroes = true;
    source_owe_dirty(&f.source);
    start_readers(&f);
    request(&f, 0, 16);
    CHECK(serve(&f));
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK_EQ(source_owed_pages(&f.source), 0);
    CHECK_EQ(f.source.stats.left_out_pages, count(&f, is_zero) - 1);
    CHECK_EQ(f.source.stats.background_pages, count(&f, has_data));
    CHECK_EQ(stored_verified(&f.stored), all_regions());
    request(&f, 0, 17);
    request(&f, 0, 17);
    request(&f, 1, 40);
    CHECK(serve(&f));
    CHECK_EQ(f.source.stats.requests_late, 1);
    end(&f);
    request(&f, 0, 48);
    CHECK(serve(&f));
    CHECK(finish_readers(&f));
    CHECK(came_right(&f));
    CHECK_EQ(times(&f, 0, 16), 1);
    CHECK_EQ(times(&f, 0, 17), 1);
    CHECK_EQ(times(&f, 1, 40), 1);
    CHECK_EQ(times(&f, 0, 18), 0);
    CHECK_EQ(times(&f, 0, 48), preempt ? 1 : 0);
    CHECK_EQ(f.source.stats.zero_pages, preempt ? 4 : 3);
    fixture_close(&f);
}

static void test_zeroes_on_main(void)
{
    zeroes(false);
}

static void test_zeroes_on_preempt(void)
{
    zeroes(true);
}

/* Who counts pages gets them all. */
static void test_all_zeroes(void)
{
    struct fixture f;

    fixture_open(&f, false);
    source_owe_dirty(&f.source);
    start_readers(&f);
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK(finish_readers(&f));
    CHECK(came_right(&f));
    CHECK_EQ(f.source.stats.zero_pages, count(&f, is_zero));
    CHECK_EQ(f.source.stats.left_out_pages, 0);
    fixture_close(&f);
}

/* Requests while the scan runs: no page twice, no data page missing. */
static void requests_beside(bool preempt)
{
    struct fixture f;
    struct job pump;
    struct job server;
    uint64_t random = 3;

    fixture_open(&f, preempt);
    f.stored.leave_out_zeroes = true;
    source_owe_dirty(&f.source);
    start_readers(&f);
    job_start(&server, run_rpath, &f.source);
    job_start(&pump, run_postcopy, &f.source);
    for (int i = 0; i < 500; i++) {
        request(&f, 0, next_random(&random) % (LENGTH / PAGE));
    }
    send_shut(&f);
    CHECK(RESULT_IS_OK(job_wait(&server)));
    CHECK(RESULT_IS_OK(job_wait(&pump)));
    CHECK_EQ(source_owed_pages(&f.source), 0);
    CHECK(finish_readers(&f));
    CHECK(came_right(&f));
    random = 3;
    for (int i = 0; i < 500; i++) {
        CHECK_EQ(times(&f, 0, next_random(&random) % (LENGTH / PAGE)), 1);
    }
    fixture_close(&f);
}

static void test_requests_beside_the_scan(void)
{
    requests_beside(false);
    requests_beside(true);
}

/* The peer has closed its preempt channel: after the end that is right. */
static void test_preempt_is_closed_at_the_end(void)
{
    struct fixture f;

    fixture_open(&f, true);
    source_owe_dirty(&f.source);
    line_hang_up(&f.preempt);
    end(&f);
    request(&f, 0, 16);
    request(&f, 0, 17);
    CHECK(serve(&f));
    fixture_close(&f);
}

/* On a new connection all that is owed is looked at again. */
static void test_restart(void)
{
    struct fixture f;

    fixture_open(&f, false);
    f.stored.leave_out_zeroes = true;
    source_owe_dirty(&f.source);
    start_readers(&f);
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK_EQ(source_owed_pages(&f.source), 0);
    source_connect(&f.source, &f.main.channel, &f.main.channel);
    CHECK_EQ(f.source.stats.left_out_pages, 0);
    CHECK_EQ(source_owed_pages(&f.source), count(&f, is_zero));
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK_EQ(source_owed_pages(&f.source), 0);
    CHECK_EQ(f.source.stats.left_out_pages, count(&f, is_zero));
    CHECK(finish_readers(&f));
    CHECK(came_right(&f));
    fixture_close(&f);
}

/* --- damage -------------------------------------------------------------- */

#define DAMAGED (3 * 64 + 5)

static void damage(struct fixture *f)
{
    f->guest.memory[0][DAMAGED * PAGE + 77] ^= 4;
}

static bool is_told(struct fixture *f)
{
    uint32_t i = 9;
    uint64_t offset = 9;

    return stored_damage(&f->stored, &i, &offset) && i == 0 &&
           offset == DAMAGED * PAGE / CHECKSUM_REGION * CHECKSUM_REGION;
}

static bool region_came(struct fixture *f)
{
    uint64_t per_region = CHECKSUM_REGION / PAGE;
    uint64_t first = DAMAGED / per_region * per_region;

    for (uint64_t p = first; p < first + per_region; p++) {
        if (times(f, 0, p)) {
            return true;
        }
    }
    return false;
}

static void damaged(struct result (*loop)(void *arg))
{
    struct fixture f;
    struct result r;

    fixture_open(&f, false);
    CHECK(!is_told(&f));
    damage(&f);
    source_owe_dirty(&f.source);
    start_readers(&f);
    r = loop(&f.source);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.err, EBADMSG);
    CHECK(is_told(&f));
    CHECK(finish_readers(&f));
    CHECK(!region_came(&f));
    fixture_close(&f);
}

/* Every region is right, and then the file ends within the page DAMAGED. */
static void cut_off(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        NEED(RESULT_IS_OK(
            stored_check(&f->stored, block(f, i), 0, block(f, i)->length)));
    }
    NEED(ftruncate(block(f, 0)->fd, DAMAGED * PAGE + 77) == 0);
}

/* Of what came: is all of it right? */
static bool nothing_wrong_came(struct fixture *f)
{
    bool right = true;

    for (uint64_t p = 0; p < block_pages(block(f, 0)); p++) {
        if (times(f, 0, p) && has_data(p)) {
            right = right && pattern_is(f->walkers[0].images[0] + p * PAGE,
                                        seed_of(0, p));
        }
    }
    return right;
}

static void cut_off_while(struct result (*loop)(void *arg), bool leave_out)
{
    struct fixture f;
    struct result r;

    fixture_open(&f, false);
    f.stored.leave_out_zeroes = leave_out;
    cut_off(&f);
    source_owe_dirty(&f.source);
    start_readers(&f);
    r = loop(&f.source);
    CHECK_EQ(r.kind, RESULT_HOST);
    CHECK_EQ(r.offset, DAMAGED * PAGE + 77);
    CHECK(is_told(&f));
    CHECK(finish_readers(&f));
    CHECK(!times(&f, 0, DAMAGED));
    CHECK(nothing_wrong_came(&f));
    fixture_close(&f);
}

static void test_cut_off_in_precopy(void)
{
    cut_off_while(run_precopy, false);
}

static void test_cut_off_in_postcopy(void)
{
    cut_off_while(run_postcopy, false);
    cut_off_while(run_postcopy, true);
}

/* Where the file is no more there is no hole either. */
static void test_cut_off_is_asked_for(void)
{
    static const uint64_t missing[] = { DAMAGED, DAMAGED + 1, DAMAGED + 40,
                                        LENGTH / PAGE - 1 };

    for (int preempt = 0; preempt < 2; preempt++) {
        for (size_t i = 0; i < sizeof(missing) / sizeof(*missing); i++) {
            struct fixture f;
            uint32_t number;
            uint64_t offset;

            fixture_open(&f, preempt);
            cut_off(&f);
            source_owe_dirty(&f.source);
            start_readers(&f);
            request(&f, 0, 3);
            CHECK(serve(&f));
            request(&f, 0, missing[i]);
            CHECK(!serve(&f));
            CHECK(stored_damage(&f.stored, &number, &offset));
            CHECK(finish_readers(&f));
            CHECK_EQ(times(&f, 0, 3), 1);
            CHECK_EQ(times(&f, 0, missing[i]), 0);
            CHECK(nothing_wrong_came(&f));
            fixture_close(&f);
        }
    }
}

static void test_damage_in_precopy(void)
{
    damaged(run_precopy);
}

static void test_damage_in_postcopy(void)
{
    damaged(run_postcopy);
}

static void test_damage_that_is_asked_for(void)
{
    struct fixture f;

    fixture_open(&f, true);
    damage(&f);
    source_owe_dirty(&f.source);
    start_readers(&f);
    request(&f, 0, DAMAGED - 16);
    CHECK(serve(&f));
    request(&f, 0, DAMAGED + 1);
    CHECK(!serve(&f));
    CHECK(is_told(&f));
    CHECK(finish_readers(&f));
    CHECK_EQ(times(&f, 0, DAMAGED - 16), 1);
    CHECK(!region_came(&f));
    fixture_close(&f);
}

/* Pages in front of it are asked for in a row: it does not go along. */
static void test_damage_is_no_neighbour(void)
{
    struct fixture f;
    struct job pump;

    fixture_open(&f, true);
    source_owe_dirty(&f.source);
    start_readers(&f);
    /* Until it is known how much goes in a moment there are no neighbours. */
    source_limit(&f.source, 1);
    job_start(&pump, run_postcopy, &f.source);
    while (__atomic_load_n(&f.walkers[0].marks, __ATOMIC_SEQ_CST) < 1) {
    }
    damage(&f);
    for (uint64_t p = 128; p < 3 * 64; p++) {
        request(&f, 0, p);
    }
    CHECK(serve(&f));
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    CHECK(finish_readers(&f));
    CHECK(!region_came(&f));
    fixture_close(&f);
}

/* --- the working set ----------------------------------------------------- */

static void test_working_set_is_bounded(void)
{
    struct fixture f;
    struct working_set *w = &f.stored.working_set;

    fixture_open(&f, false);
    CHECK(!working_set_add_untrusted(w, &f.guest.ram, working_set_page(2, 0)));
    CHECK(!working_set_add_untrusted(w, &f.guest.ram,
                                     working_set_page(1, VGA_PAGES)));
    CHECK(!working_set_add_untrusted(w, &f.guest.ram, UINT64_MAX));
    CHECK(working_set_add_untrusted(w, &f.guest.ram,
                                    working_set_page(1, VGA_PAGES - 1)));
    for (uint32_t i = 1; i < WORKING_SET_MAX; i++) {
        CHECK(working_set_add_untrusted(w, &f.guest.ram, 0));
    }
    CHECK(!working_set_add_untrusted(w, &f.guest.ram, 0));
    CHECK_EQ(w->first_count, WORKING_SET_MAX);
    for (uint32_t i = 0; i < WORKING_SET_MAX + 5; i++) {
        working_set_note(w, i);
    }
    CHECK_EQ(w->asked_count, WORKING_SET_MAX);
    CHECK_EQ(w->asked[WORKING_SET_MAX - 1], WORKING_SET_MAX - 1);
    fixture_close(&f);
}

static void test_requests_are_noted(void)
{
    struct fixture f;
    const struct working_set *w = &f.stored.working_set;

    fixture_open(&f, true);
    source_owe_dirty(&f.source);
    start_readers(&f);
    request(&f, 1, 299);
    request(&f, 0, 900);
    request(&f, 1, 299); /* late */
    request(&f, 0, 40);
    CHECK(serve(&f));
    CHECK_EQ(w->asked_count, 3);
    CHECK_EQ(w->asked[0], working_set_page(1, 299));
    CHECK_EQ(w->asked[1], working_set_page(0, 900));
    CHECK_EQ(w->asked[2], working_set_page(0, 40));
    CHECK(finish_readers(&f));
    fixture_close(&f);
}

/* With a limit so low that nothing else follows. */
static void test_working_set_comes_first(void)
{
    struct fixture f;
    struct job pump;

    fixture_open(&f, false);
    f.stored.leave_out_zeroes = true;
    CHECK(working_set_add_untrusted(&f.stored.working_set, &f.guest.ram,
                                    working_set_page(1, 5)));
    source_owe_dirty(&f.source);
    source_limit(&f.source, 1);
    start_readers(&f);
    job_start(&pump, run_postcopy, &f.source);
    while (__atomic_load_n(&f.walkers[0].records, __ATOMIC_SEQ_CST) < 1) {
    }
    set_event(f.main.stop_fd);
    CHECK_EQ(job_wait(&pump).kind, RESULT_STOPPED);
    CHECK(finish_readers(&f));
    CHECK_EQ(times(&f, 1, 5), 1);
    CHECK_EQ(f.source.stats.working_set_pages, 1);
    fixture_close(&f);
}

/* Zeroes that were asked for once are sent; what is sent already is not. */
static void test_working_set_and_the_rest(void)
{
    struct fixture f;
    static const uint64_t pages[] = { 900, 17, 48, 900, 3, 20 };

    fixture_open(&f, false);
    f.stored.leave_out_zeroes = true;
    for (size_t i = 0; i < sizeof(pages) / sizeof(*pages); i++) {
        CHECK(working_set_add_untrusted(&f.stored.working_set, &f.guest.ram,
                                        pages[i]));
    }
    source_owe_dirty(&f.source);
    start_readers(&f);
    request(&f, 0, 20);
    CHECK(serve(&f));
    CHECK(RESULT_IS_OK(pump_postcopy(&f.source)));
    CHECK(finish_readers(&f));
    CHECK(came_right(&f));
    CHECK_EQ(times(&f, 0, 17), 1);
    CHECK_EQ(times(&f, 0, 48), 1);
    CHECK_EQ(f.source.stats.working_set_pages, 4);
    CHECK_EQ(f.source.stats.zero_pages, 3 + !has_data(900));
    fixture_close(&f);
}

/* --- blocks within a file ------------------------------------------------ */

static void test_start_in_a_file(void)
{
    const uint64_t start = 3 * PAGE;
    uint8_t page[PAGE];
    struct ram ram;
    int fd = memfd_create("image", MFD_CLOEXEC);

    NEED(fd >= 0 && ftruncate(fd, (off_t)(start + MIB)) == 0);
    pattern_fill(page, 1);
    NEED(pwrite(fd, page, PAGE, 0) == PAGE);
    NEED(pwrite(fd, page, PAGE, (off_t)(start + 7 * PAGE)) == PAGE);
    CHECK(RESULT_IS_OK(ram_open(&ram, 1)));
    CHECK(RESULT_IS_OK(ram_add(&ram, "ram", MIB, PAGE, 0, fd)));
    CHECK_EQ(ram_start_at(&ram, 1).err, EINVAL);
    CHECK_EQ(ram_start_at(&ram, start + PAGE).err, EINVAL);
    CHECK_EQ(ram_start_at(&ram, -PAGE).err, EINVAL);
    CHECK(RESULT_IS_OK(ram_start_at(&ram, start)));
    CHECK(RESULT_IS_OK(ram_prepare_source(&ram)));
    CHECK_EQ(ram_next_data(&ram.blocks[0], 0), 7 * PAGE);
    CHECK_EQ(ram_next_data(&ram.blocks[0], 8 * PAGE), MIB);
    CHECK(pattern_is(ram.blocks[0].map + 7 * PAGE, 1));
    ram_close(&ram);
    close(fd);
}

int main(void)
{
    RUN(test_zeroes_on_main);
    RUN(test_zeroes_on_preempt);
    RUN(test_all_zeroes);
    RUN(test_requests_beside_the_scan);
    RUN(test_preempt_is_closed_at_the_end);
    RUN(test_restart);
    RUN(test_cut_off_in_precopy);
    RUN(test_cut_off_in_postcopy);
    RUN(test_cut_off_is_asked_for);
    RUN(test_damage_in_precopy);
    RUN(test_damage_in_postcopy);
    RUN(test_damage_that_is_asked_for);
    RUN(test_damage_is_no_neighbour);
    RUN(test_working_set_is_bounded);
    RUN(test_requests_are_noted);
    RUN(test_working_set_comes_first);
    RUN(test_working_set_and_the_rest);
    RUN(test_start_in_a_file);
    return check_status();
}
