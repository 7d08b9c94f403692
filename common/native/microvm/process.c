/*
 * The state of a worker is one record of 13 integers, 64 bits, big-endian, in
 * the order of `enum field`. Everything else is in the guest's RAM.
 */
#include "process.h"

#include <endian.h>
#include <string.h>
#include <time.h>

/* Platform of the workload */

static struct serial *output;
static bool has_moved;

static void print(const char *bytes, size_t length)
{
    serial_write(output, bytes, length);
}

/* Set by load() before the workers go on, and then only worker 0 looks. */
static bool moved(void)
{
    bool answer = has_moved;

    has_moved = false;
    return answer;
}

static const struct platform platform = { print, moved };

/* Running */

static void run_worker(struct gate_thread *thread)
{
    struct worker *worker = (struct worker *)thread;
    struct workload *w = &worker->workload;

    for (;;) {
        gate_enter(thread);
        /*
         * From here the handler of the kick comes back with 1 if it finds the
         * worker touching memory; the step is then done anew after the stop.
         */
        if (sigsetjmp(thread->escape, 1))
            w->touching = 0;
        while (!w->stop) {
            uint32_t wait = workload_step(w);

            if (wait > 0)
                gate_nap(thread, wait);
        }
        gate_leave(thread);
    }
}

static uint64_t monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t measure_tsc_khz(void)
{
    uint64_t start = monotonic_ns(), ticks = __builtin_ia32_rdtsc();
    uint64_t passed;

    nanosleep(&(struct timespec){ .tv_nsec = 20000000 }, NULL);
    passed = monotonic_ns() - start;
    return (__builtin_ia32_rdtsc() - ticks) * 1000000 / passed;
}

/* State */

enum field {
    FIELD_SEED,
    FIELD_WRITE_RATE,
    FIELD_SWEEP,
    FIELD_MODE,
    FIELD_TABLE_OFFSET,
    FIELD_AREA_OFFSET,
    FIELD_AREA_PAGES,
    FIELD_FIRST,
    FIELD_PAGES,
    FIELD_FILL_NEXT,
    FIELD_RANDOM,
    FIELD_SWEEP_NEXT,
    FIELD_STEPS,
    FIELDS,
};

static void save_worker(const struct workload *w, struct state_writer *out)
{
    const uint64_t values[FIELDS] = {
        [FIELD_SEED] = w->settings.seed,
        [FIELD_WRITE_RATE] = w->settings.write_rate,
        [FIELD_SWEEP] = w->settings.sweep,
        [FIELD_MODE] = w->settings.mode,
        [FIELD_TABLE_OFFSET] = w->layout.table_offset,
        [FIELD_AREA_OFFSET] = w->layout.area_offset,
        [FIELD_AREA_PAGES] = w->layout.area_pages,
        [FIELD_FIRST] = w->first,
        [FIELD_PAGES] = w->pages,
        [FIELD_FILL_NEXT] = w->fill_next,
        [FIELD_RANDOM] = w->random,
        [FIELD_SWEEP_NEXT] = w->sweep_next,
        [FIELD_STEPS] = w->steps,
    };
    uint64_t bytes[FIELDS];

    for (size_t i = 0; i < FIELDS; i++)
        bytes[i] = htobe64(values[i]);
    state_put(out, STATE_WORKER, w->index, bytes, sizeof(bytes));
}

/* Would a worker with these numbers stay inside of the RAM? */
static bool is_sane(const struct ram *ram, const uint64_t v[FIELDS])
{
    uint64_t pages = ram->length / GUEST_PAGE;
    uint64_t table_pages = (v[FIELD_AREA_PAGES] + 1023) / 1024;

    return v[FIELD_MODE] <= REPORT_IDLE && v[FIELD_AREA_PAGES] <= pages &&
           v[FIELD_AREA_OFFSET] % GUEST_PAGE == 0 &&
           v[FIELD_AREA_OFFSET] / GUEST_PAGE <= pages - v[FIELD_AREA_PAGES] &&
           v[FIELD_TABLE_OFFSET] % GUEST_PAGE == 0 &&
           v[FIELD_TABLE_OFFSET] / GUEST_PAGE <= pages - table_pages &&
           v[FIELD_PAGES] >= 1 && v[FIELD_PAGES] <= v[FIELD_AREA_PAGES] &&
           v[FIELD_FIRST] <= v[FIELD_AREA_PAGES] - v[FIELD_PAGES] &&
           v[FIELD_FILL_NEXT] <= v[FIELD_PAGES] &&
           v[FIELD_SWEEP_NEXT] < v[FIELD_PAGES];
}

static bool load_worker(struct process *p, struct workload *w, uint32_t index,
                        const struct state *state, struct fail *why)
{
    const struct state_record *r = state_find(state, index, STATE_WORKER);
    uint64_t v[FIELDS];

    if (!r || r->length != sizeof(v))
        return fail(why, "the device state lacks worker %u", index);
    memcpy(v, r->bytes, sizeof(v));
    for (size_t i = 0; i < FIELDS; i++)
        v[i] = be64toh(v[i]);
    if (!is_sane(p->ram, v))
        return fail(why, "the device state of worker %u does not fit this RAM",
                    index);
    *w = (struct workload){
        .platform = &platform,
        .ram = p->ram->base,
        .index = index,
        .settings = {
            .seed = v[FIELD_SEED],
            .write_rate = v[FIELD_WRITE_RATE],
            .sweep = v[FIELD_SWEEP],
            .mode = (uint32_t)v[FIELD_MODE],
            .tsc_khz = p->tsc_khz,
            .vcpus = p->engine.vcpus,
        },
        .layout = {
            .table_offset = v[FIELD_TABLE_OFFSET],
            .area_offset = v[FIELD_AREA_OFFSET],
            .area_pages = v[FIELD_AREA_PAGES],
        },
        .first = v[FIELD_FIRST],
        .pages = v[FIELD_PAGES],
        .fill_next = v[FIELD_FILL_NEXT],
        .random = v[FIELD_RANDOM],
        .sweep_next = v[FIELD_SWEEP_NEXT],
        .steps = v[FIELD_STEPS],
    };
    return true;
}

static bool save(struct engine *engine, struct state_writer *out,
                 struct fail *why)
{
    struct process *p = (struct process *)engine;

    state_begin(out, STATE_PROCESS, engine->vcpus);
    for (unsigned i = 0; i < engine->vcpus; i++)
        save_worker(&p->workers[i].workload, out);
    return state_end(out, why);
}

static bool load(struct engine *engine, const struct state *state,
                 struct fail *why)
{
    struct process *p = (struct process *)engine;

    if (state->accel != STATE_PROCESS)
        return fail(why, "the device state is of a KVM guest");
    for (unsigned i = 0; i < engine->vcpus; i++) {
        if (!load_worker(p, &p->workers[i].workload, i, state, why))
            return false;
    }
    has_moved = true;
    return true;
}

/* Creating */

bool process_create(struct process *process, const struct ram *ram,
                    unsigned vcpus, struct serial *serial, struct fail *why)
{
    process->engine = (struct engine){
        .device = "microvm-process", .vcpus = vcpus, .save = save, .load = load
    };
    process->ram = ram;
    process->tsc_khz = measure_tsc_khz();
    output = serial;
    if (!gate_create(&process->engine.gate, why))
        return false;
    for (unsigned i = 0; i < vcpus; i++) {
        struct worker *worker = &process->workers[i];

        worker->thread.run = run_worker;
        worker->thread.kick = &worker->workload.stop;
        worker->thread.may_escape = &worker->workload.touching;
        if (!gate_start(&process->engine.gate, &worker->thread, why))
            return false;
    }
    return true;
}

bool process_boot(struct process *process, const char *command_line,
                  struct fail *why)
{
    struct settings settings = settings_parse(command_line);
    struct layout layout;

    settings.tsc_khz = process->tsc_khz;
    settings.vcpus = process->engine.vcpus;
    if (!layout_make(&layout, &settings, process->ram->length))
        return fail(why, "the memory is too small for the guest");
    layout_report(&layout, &settings, process->ram->base);
    for (uint32_t i = 0; i < settings.vcpus; i++)
        workload_init(&process->workers[i].workload, &platform,
                      process->ram->base, i, &settings, &layout);
    return true;
}
