#include "workload.h"
#include "text.h"

#define WORDS (GUEST_PAGE / 8)
#define TABLE_OFFSET (4u << 20)
#define ALIGN (2u << 20)

#define SLOW_US 100u
#define ALIVE_US 1000000u
#define MOVED_US 20000u
#define NAP_MAX_US 10000u
/* A worker that fell behind its rate by more than this doesn't catch up. */
#define DEBT_US 100000u

/* Odd, and no simple fraction of 2^64: neighbouring words share no bytes. */
#define WORD_STEP 0x9e3779b97f4a7c15u

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 31)) * 0x7fb5d329728ea185u;
    x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44du;
    return x ^ (x >> 33);
}

/* Placement */

/*
 * The table for as many pages as there could be, and the area at the end of
 * the RAM: between them is memory that nobody ever touches, and a guest with
 * much RAM and a small area uses guest addresses above 4 GiB.
 */
bool layout_make(struct layout *l, const struct settings *s, uint64_t ram_size)
{
    uint64_t table_max = ram_size / GUEST_PAGE * sizeof(uint32_t);
    uint64_t lowest = (TABLE_OFFSET + table_max + ALIGN - 1) / ALIGN * ALIGN;
    uint64_t area;

    if (ram_size < lowest)
        return false;
    area = ram_size - lowest;
    if (s->area && s->area < area)
        area = s->area;
    l->table_offset = TABLE_OFFSET;
    l->area_offset = (ram_size - area) / ALIGN * ALIGN;
    l->area_pages = area / GUEST_PAGE;
    return l->area_pages >= s->vcpus;
}

static struct report *report_of(uint8_t *ram)
{
    return (struct report *)(void *)(ram + REPORT_ADDRESS);
}

void layout_report(const struct layout *l, const struct settings *s,
                   uint8_t *ram)
{
    struct report_header *h = &report_of(ram)->header;

    h->version = REPORT_VERSION;
    h->vcpus = s->vcpus;
    h->tsc_khz = s->tsc_khz;
    h->area_offset = l->area_offset;
    h->area_pages = l->area_pages;
    h->table_offset = l->table_offset;
    h->seed = s->seed;
    h->write_rate = s->write_rate;
    h->mode = s->mode;
    /* Last: whoever finds it finds the rest. */
    __atomic_store_n(&h->magic, REPORT_MAGIC, __ATOMIC_RELEASE);
}

void workload_init(struct workload *w, const struct platform *platform,
                   uint8_t *ram, uint32_t index, const struct settings *s,
                   const struct layout *l)
{
    uint64_t share = l->area_pages / s->vcpus;

    *w = (struct workload){
        .platform = platform,
        .ram = ram,
        .index = index,
        .settings = *s,
        .layout = *l,
        .first = share * index,
        .pages = index + 1 == s->vcpus ? l->area_pages - share * index : share,
        .random = mix(s->seed + index) | 1,
    };
}

static struct report_vcpu *mine(const struct workload *w)
{
    return &report_of(w->ram)->vcpus[w->index];
}

static volatile uint64_t *page_words(const struct workload *w, uint64_t page)
{
    return (volatile uint64_t *)(void *)(w->ram + w->layout.area_offset +
                                         page * GUEST_PAGE);
}

static volatile uint32_t *generation_of(const struct workload *w, uint64_t page)
{
    return (volatile uint32_t *)(void *)(w->ram + w->layout.table_offset) +
           page;
}

static uint64_t ticks_from_us(const struct workload *w, uint64_t us)
{
    return us * w->settings.tsc_khz / 1000;
}

static uint64_t now(void)
{
    return __builtin_ia32_rdtsc();
}

/* Without the fence the counter would be read before the access is done. */
static uint64_t now_that_it_is_done(void)
{
    __asm__ volatile("lfence" : : : "memory");
    return now();
}

/* Contents of a page */

/* Word 0 says what the page is; it is for whoever looks at a wrong one. */
static uint64_t first_word(uint64_t page, uint32_t generation)
{
    return (uint64_t)generation << 32 | (uint32_t)page;
}

static uint64_t base_word(const struct workload *w, uint64_t page,
                          uint32_t generation)
{
    return mix(mix(w->settings.seed ^ page << 20) + generation);
}

static void write_page(struct workload *w, uint64_t page, uint32_t generation)
{
    volatile uint64_t *words = page_words(w, page);
    uint64_t word = base_word(w, page, generation);

    words[0] = first_word(page, generation);
    for (unsigned i = 1; i < WORDS; i++) {
        word += WORD_STEP;
        words[i] = word;
    }
    *generation_of(w, page) = generation;
}

static void say_wrong(const struct workload *w, const struct report_wrong *x)
{
    struct text t = { 0 };

    text_add(&t, "WRONG page ");
    text_add_number(&t, x->page);
    text_add(&t, " word ");
    text_add_number(&t, x->word);
    text_add(&t, ": expected ");
    text_add_hex(&t, x->expected);
    text_add(&t, " got ");
    text_add_hex(&t, x->got);
    text_add(&t, " (generation ");
    text_add_number(&t, x->generation);
    text_add(&t, ", the page says ");
    text_add_number(&t, page_words(w, x->page)[0] >> 32);
    text_add(&t, ")\n");
    w->platform->print(t.bytes, t.length);
}

static void found_wrong(struct workload *w, const struct report_wrong *x)
{
    struct report_counters *c = &mine(w)->counters;

    if (c->wrong++ == 0)
        c->first_wrong = *x;
    say_wrong(w, x);
}

static void check_page(struct workload *w, uint64_t page, uint32_t generation)
{
    volatile uint64_t *words = page_words(w, page);
    uint64_t word = base_word(w, page, generation);
    uint64_t expected = first_word(page, generation);

    mine(w)->counters.checked++;
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t got = words[i];

        if (got != expected) {
            found_wrong(w, &(struct report_wrong){ page, i, expected, got,
                                                   generation, 0 });
            return;
        }
        word += WORD_STEP;
        expected = word;
    }
}

/* Times of accesses */

static unsigned bucket_of(uint64_t ticks)
{
    unsigned log;

    if (ticks < 8)
        return (unsigned)ticks;
    log = 63 - (unsigned)__builtin_clzll(ticks);
    return 8 * log + (unsigned)(ticks >> (log - 3) & 7);
}

static void count_access(struct workload *w, uint64_t page, uint64_t start,
                         uint64_t end)
{
    struct report_vcpu *v = mine(w);
    struct report_counters *c = &v->counters;
    /* The counter of another host may be behind the one of this. */
    uint64_t ticks = end > start ? end - start : 0;

    v->histogram[bucket_of(ticks)]++;
    if (ticks > c->slowest_ticks) {
        c->slowest_ticks = ticks;
        c->slowest_page = page;
    }
    if (ticks >= c->slow_ticks) {
        v->slow[c->slow % REPORT_SLOW] =
            (struct report_slow){ end, ticks, page, c->counter };
        c->slow++;
    }
}

/* Touching: the half of a step that may wait and be left */

static void touch(const volatile void *address)
{
    (void)*(const volatile uint8_t *)address;
}

static void touch_mine(const struct workload *w)
{
    const struct report_vcpu *v = mine(w);

    touch(&v->counters);
    touch(v->histogram);
    touch(v->slow);
}

static void touch_all_counters(const struct workload *w)
{
    const struct report *r = report_of(w->ram);

    touch(&r->header);
    for (unsigned i = 0; i < w->settings.vcpus; i++)
        touch(&r->vcpus[i].counters);
}

/* A store of what is there already: the page must be present and writable. */
static void touch_for_writing(volatile uint64_t *word)
{
    *word = *word;
}

/* False if the step has to end here. */
static bool start_touching(struct workload *w)
{
    w->touching = 1;
    /* Before the look at `stop`: whoever sets it looks at `touching` next. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (!w->stop)
        return true;
    w->touching = 0;
    return false;
}

static void end_touching(struct workload *w)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    w->touching = 0;
}

/* Filling */

static void start_running(struct workload *w)
{
    mine(w)->counters.sweeps = 0;
    w->pace_tsc = now();
    w->pace_pages = 0;
    __atomic_store_n(&mine(w)->counters.state, REPORT_RUNNING,
                     __ATOMIC_RELEASE);
}

static void start_filling(struct workload *w)
{
    struct report_counters *c = &mine(w)->counters;

    c->slice_first = w->first;
    c->slice_pages = w->pages;
    c->slow_ticks = ticks_from_us(w, SLOW_US);
    c->state = REPORT_FILLING;
}

static void fill_step(struct workload *w)
{
    uint64_t page = w->first + w->fill_next;

    if (!start_touching(w))
        return;
    touch_mine(w);
    touch_for_writing(page_words(w, page));
    touch(generation_of(w, page));
    end_touching(w);

    if (w->fill_next == 0)
        start_filling(w);
    write_page(w, page, 1);
    mine(w)->counters.filled++;
    mine(w)->counters.counter++;
    if (++w->fill_next == w->pages)
        start_running(w);
}

/* Running */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return mix(*state);
}

static bool is_sweep_step(const struct workload *w)
{
    return w->settings.sweep && w->steps % w->settings.sweep == 0;
}

static void advance_sweep(struct workload *w)
{
    if (++w->sweep_next == w->pages) {
        w->sweep_next = 0;
        mine(w)->counters.sweeps++;
    }
}

static void access_step(struct workload *w)
{
    bool sweep = is_sweep_step(w);
    uint64_t random = w->random;
    uint64_t page =
        w->first + (sweep ? w->sweep_next : next_random(&random) % w->pages);
    volatile uint64_t *words = page_words(w, page);
    uint32_t generation;
    uint64_t start, end;

    if (!start_touching(w))
        return;
    touch_mine(w);
    generation = *generation_of(w, page);
    start = now();
    if (w->settings.mode == REPORT_WRITING)
        touch_for_writing(words);
    else
        touch(words);
    end = now_that_it_is_done();
    end_touching(w);

    count_access(w, page, start, end);
    check_page(w, page, generation);
    if (w->settings.mode == REPORT_WRITING) {
        write_page(w, page, generation + 1);
        mine(w)->counters.written++;
        w->pace_pages++;
    }
    mine(w)->counters.counter++;
    w->random = random;
    w->steps++;
    if (sweep)
        advance_sweep(w);
}

/* Microseconds until the next page may be written; 0: now. */
static uint32_t wait_for_rate(struct workload *w)
{
    uint64_t rate = w->settings.write_rate / w->settings.vcpus;
    uint64_t us = (now() - w->pace_tsc) / (w->settings.tsc_khz / 1000);
    uint64_t due;

    if (rate == 0 || w->settings.mode != REPORT_WRITING)
        return 0;
    due = w->pace_pages * GUEST_PAGE * 1000000 / rate;
    /* So far off that the guest was stopped, or the TSC is another one. */
    if (us > due + DEBT_US || us > UINT32_MAX) {
        w->pace_tsc = now();
        w->pace_pages = 0;
        return 0;
    }
    if (due <= us)
        return 0;
    return due - us < NAP_MAX_US ? (uint32_t)(due - us) : NAP_MAX_US;
}

static void idle_step(struct workload *w)
{
    if (!start_touching(w))
        return;
    touch_mine(w);
    end_touching(w);
    mine(w)->counters.counter++;
}

/* Worker 0 talks */

static void say_alive(const struct workload *w, const char *first)
{
    struct report *r = report_of(w->ram);
    uint64_t counter = 0, checked = 0, wrong = 0;
    struct text t = { 0 };

    for (unsigned i = 0; i < w->settings.vcpus; i++) {
        counter += r->vcpus[i].counters.counter;
        checked += r->vcpus[i].counters.checked;
        wrong += r->vcpus[i].counters.wrong;
    }
    text_add(&t, first);
    text_add(&t, " counter=");
    text_add_number(&t, counter);
    text_add(&t, " checked=");
    text_add_number(&t, checked);
    text_add(&t, " wrong=");
    text_add_number(&t, wrong);
    text_add(&t, "\n");
    w->platform->print(t.bytes, t.length);
}

static void say_filled(const struct workload *w)
{
    struct text t = { 0 };

    text_add(&t, "filled ");
    text_add_number(&t, w->layout.area_pages);
    text_add(&t, " pages\n");
    w->platform->print(t.bytes, t.length);
}

static bool all_running(const struct workload *w)
{
    struct report *r = report_of(w->ram);

    for (unsigned i = 0; i < w->settings.vcpus; i++) {
        if (__atomic_load_n(&r->vcpus[i].counters.state, __ATOMIC_ACQUIRE) !=
            REPORT_RUNNING)
            return false;
    }
    return true;
}

/* True when `period_us` have passed since the last time; also at first. */
static bool due(const struct workload *w, uint64_t *when, uint64_t period_us)
{
    uint64_t period = ticks_from_us(w, period_us);
    uint64_t left = *when - now();

    if (left <= period)
        return false;
    *when = now() + period;
    return true;
}

static void talk(struct workload *w)
{
    struct report_header *h = &report_of(w->ram)->header;

    if (!start_touching(w))
        return;
    touch_all_counters(w);
    end_touching(w);

    if (!h->filled && all_running(w)) {
        h->filled = 1;
        say_filled(w);
    }
    if (w->platform->moved())
        say_alive(w, "goes on at");
    if (due(w, &w->alive_tsc, ALIVE_US))
        say_alive(w, "alive");
}

uint32_t workload_step(struct workload *w)
{
    uint32_t wait;

    if (w->index == 0 && due(w, &w->moved_tsc, MOVED_US))
        talk(w);
    if (w->fill_next < w->pages) {
        fill_step(w);
        return 0;
    }
    if (w->settings.mode == REPORT_IDLE) {
        idle_step(w);
        return NAP_MAX_US;
    }
    wait = wait_for_rate(w);
    if (wait == 0)
        access_step(w);
    return wait;
}
