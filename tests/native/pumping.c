#include "pumping.h"

#define SHUT 1

static const struct block_spec layouts[][2] = {
    [SMALL] = {
        { .idstr = "ram", .length = 8 * MIB, .page_size = PAGE },
        { .idstr = "vga", .length = 300 * PAGE, .page_size = PAGE },
    },
    [MIXED] = {
        { .idstr = "ram", .length = 16 * MIB, .page_size = HUGE,
          .plain = true },
        { .idstr = "vga", .length = 300 * PAGE, .page_size = PAGE },
    },
};

static uint64_t seed_of(uint32_t block, uint64_t page)
{
    return (uint64_t)(block + 1) << 32 | page;
}

bool has_data(uint64_t page)
{
    return page / 64 % 16 != 7 && page % 3 != 2;
}

static void fill_guest(struct guest *g)
{
    for (uint32_t i = 0; i < g->ram.count; i++) {
        for (uint64_t p = 0; p < block_pages(&g->ram.blocks[i]); p++) {
            uint8_t *at = g->memory[i] + p * PAGE;

            if (has_data(p)) {
                pattern_fill(at, seed_of(i, p));
            } else if (p / 64 % 16 != 7) {
                memset(at, 0, PAGE);
            }
        }
    }
}

void fixture_open(struct fixture *f, int layout, bool preempt)
{
    guest_open(&f->guest, layouts[layout], 2);
    fill_guest(&f->guest);
    NEED(RESULT_IS_OK(ram_prepare_source(&f->guest.ram)));
    NEED(RESULT_IS_OK(source_open(&f->source, &f->guest.ram, SECTION)));
    line_open(&f->main);
    line_open(&f->preempt);
    source_connect(&f->source, &f->main.channel,
                   preempt ? &f->preempt.channel : &f->main.channel);
    walker_open(&f->walkers[0], f->main.peer, &f->guest.ram, SECTION);
    f->walkers[0].asker = &f->source;
    walker_share(&f->walkers[1], &f->walkers[0], f->preempt.peer);
}

void start_readers(struct fixture *f, bool postcopy)
{
    for (int i = 0; i < 2; i++) {
        f->walkers[i].whole_hosts = postcopy;
        job_start(&f->readers[i], walker_run, &f->walkers[i]);
    }
}

bool finish_readers(struct fixture *f)
{
    line_finish(&f->main);
    line_finish(&f->preempt);
    return (int)RESULT_IS_OK(job_wait(&f->readers[0])) &
           (int)RESULT_IS_OK(job_wait(&f->readers[1]));
}

void fixture_close(struct fixture *f)
{
    walker_close(&f->walkers[0]);
    line_close(&f->main);
    line_close(&f->preempt);
    source_close(&f->source);
    guest_close(&f->guest);
}

struct ram_block *block(struct fixture *f, uint32_t i)
{
    return &f->guest.ram.blocks[i];
}

void dirty_all(struct fixture *f)
{
    for (uint32_t i = 0; i < 2; i++) {
        bitmap_set_range(&block(f, i)->dirty, 0, block(f, i)->dirty.bits);
    }
}

uint64_t dirty_some(struct fixture *f, uint64_t n)
{
    uint64_t random = 7;

    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; p < block_pages(block(f, i)); p++) {
            if (next_random(&random) % n == 0) {
                bitmap_test_and_set(&block(f, i)->dirty, p);
            }
        }
    }
    return source_dirty_pages(&f->source);
}

struct expectation expect(struct fixture *f, bool owed)
{
    struct expectation e;

    for (uint32_t i = 0; i < 2; i++) {
        const struct ram_block *b = block(f, i);

        e.pages[i] = calloc(block_pages(b), sizeof(bool));
        NEED(e.pages[i]);
        for (uint64_t p = 0; p < block_pages(b); p++) {
            e.pages[i][p] =
                owed ? bitmap_test(&b->owed, p >> block_pages_bits(b)) :
                       bitmap_test(&b->dirty, p);
        }
    }
    return e;
}

static bool page_came(struct fixture *f, uint32_t i, uint64_t p, bool wanted)
{
    uint32_t count = f->walkers[0].counts[i][p];
    const uint8_t *image = f->walkers[0].images[i] + p * PAGE;

    if (count != (wanted ? 1 : 0)) {
        fprintf(stderr, "block %u page %lu came %u times\n", i,
                (unsigned long)p, count);
        return false;
    }
    return !count || (has_data(p) ? pattern_is(image, seed_of(i, p)) :
                                    is_all_zero(image));
}

bool came_exactly_once(struct fixture *f, struct expectation *e)
{
    bool ok = true;

    for (uint32_t i = 0; i < 2; i++) {
        for (uint64_t p = 0; ok && p < block_pages(block(f, i)); p++) {
            ok = page_came(f, i, p, e->pages[i][p]);
        }
        free(e->pages[i]);
    }
    return ok;
}

void wait_for_records(struct walker *w, uint64_t records)
{
    while (__atomic_load_n(&w->records, __ATOMIC_SEQ_CST) < records) {
    }
}

struct result run_postcopy(void *arg)
{
    return pump_postcopy(arg);
}

struct result run_rpath(void *arg)
{
    struct rp_message m;

    return rpath_run(arg, &m);
}

void request(struct fixture *f, uint32_t i, uint64_t host)
{
    const struct ram_block *b = block(f, i);
    struct script s = { 0 };

    put_be16(&s, 3);
    put_be16(&s, (uint16_t)(13 + b->idstr_length));
    put_be64(&s, host << b->host_bits);
    put_be32(&s, (uint32_t)b->page_size);
    put_name(&s, b->idstr);
    send_all(f->main.peer, s.bytes, s.size);
    script_free(&s);
}

void send_shut(struct fixture *f)
{
    static const uint8_t shut[] = { 0, SHUT, 0, 4, 0, 0, 0, 0 };

    send_all(f->main.peer, shut, sizeof(shut));
}

void request_some(struct fixture *f, uint64_t *random, int count)
{
    while (count--) {
        uint32_t i = next_random(random) % 4 == 0;

        request(f, i, next_random(random) % block_hosts(block(f, i)));
    }
}

void send_end(struct fixture *f)
{
    struct script s = { 0 };

    put_section(&s, 3, SECTION);
    put_end_of_section(&s, SECTION);
    NEED(RESULT_IS_OK(channel_write(&f->main.channel, s.bytes, s.size)));
    script_free(&s);
}
