/*
 * limit_fault: what a page fault over TCP costs the guest that waits for it,
 * with nothing in between that a migration needs. See fault_options.c.
 */
#include "account.h"
#include "fault_options.h"
#include "memory.h"
#include "options.h"
#include "page_client.h"
#include "tcp.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define HOST_MAX 63

struct figures {
    double elapsed;
    double server_cpu_seconds;
    double vcpu_seconds;
    uint64_t server_own_bytes;
    uint64_t own_bytes;
    struct report before;
    struct report after;
};

/* All that is there, static: threads run until the process ends. */
struct bench {
    struct limit_guest guest;
    struct page_server server;
    struct page_fetcher fetcher;
    struct page_filler filler;
};

/* Preparing */

/* Where the server connects to. */
struct address {
    char host[HOST_MAX + 1];
    uint16_t port;
};

/* A line HOST:PORT from standard input. */
static bool read_address(struct address *a, struct fail *why)
{
    char line[HOST_MAX + 16];
    unsigned port;
    char *colon;

    if (!fgets(line, sizeof(line), stdin))
        return fail(why, "no address on standard input");
    line[strcspn(line, "\n")] = '\0';
    colon = strrchr(line, ':');
    if (!colon || colon - line > HOST_MAX)
        return fail(why, "an address is HOST:PORT, not '%s'", line);
    *colon = '\0';
    memcpy(a->host, line, (size_t)(colon - line) + 1);
    if (!option_count("a port", colon + 1, UINT16_MAX, &port, why))
        return false;
    a->port = (uint16_t)port;
    return true;
}

static bool find_address(const struct fault_options *o, struct bench *b,
                         struct address *a, struct fail *why)
{
    *a = (struct address){ .host = "127.0.0.1" };
    b->server.listener = tcp_listen(&a->port, why);
    if (b->server.listener < 0)
        return false;
    if (!o->relay)
        return true;
    printf("listening %s:%u\n", a->host, a->port);
    fflush(stdout);
    return read_address(a, why);
}

/* Without a background there is nothing to wait for once all are fetched. */
static uint64_t fault_limit(const struct fault_options *o,
                            const struct page_target *t)
{
    uint64_t pages = (t->end - t->start) / t->page_size;

    return o->faults && o->faults < pages ? o->faults : pages;
}

static bool connect_all(const struct fault_options *o, struct bench *b,
                        struct fail *why)
{
    const struct limit_guest *g = &b->guest;
    struct page_target target = { .base = g->ram.base,
                                  .userfaultfd = g->ram.userfaultfd,
                                  .start = g->area_start,
                                  .end = g->area_end,
                                  .page_size = (uint32_t)g->ram.page_size };

    b->fetcher.limit = o->background ? 0 : fault_limit(o, &target);
    return page_fetcher_open(&b->fetcher, &target, &b->server, why) &&
           (!o->background ||
            page_filler_open(&b->filler, &target, o->rate, &b->server, why));
}

/* The server first: it must not inherit the guest. */
static bool prepare(const struct fault_options *o, struct bench *b,
                    struct fail *why)
{
    uint64_t memory = o->guest.memory;
    int file = memory_file(memory, why);
    struct address a;

    return file >= 0 && find_address(o, b, &a, why) &&
           page_server_start(&b->server, file, memory, a.host, a.port, why) &&
           limit_guest_boot(&b->guest, &o->guest, why) &&
           limit_guest_fill(&b->guest, why) &&
           limit_guest_copy(&b->guest, file, why) && connect_all(o, b, why) &&
           limit_guest_empty(&b->guest, why);
}

/* Measuring */

/* Until `event` or the end of the guest; 0 seconds: for ever. */
static bool wait_for(struct bench *b, int event, unsigned seconds,
                     struct fail *why)
{
    const struct gate *gate = &b->guest.vm.engine.gate;
    struct pollfd wanted[] = { { event, POLLIN, 0 },
                               { gate->event, POLLIN, 0 } };
    int timeout = seconds ? (int)seconds * 1000 : -1;

    if (poll(wanted, 2, timeout) < 0)
        return fail(why, "cannot wait: %s", strerror(errno));
    return !wanted[1].revents || fail(why, "%s", gate->reason.text);
}

static bool start(const struct fault_options *o, struct bench *b,
                  struct fail *why)
{
    return page_fetcher_start(&b->fetcher, why) &&
           (!o->background || page_filler_start(&b->filler, why)) &&
           limit_guest_continue(&b->guest, why);
}

static bool wait_for_pages(const struct fault_options *o, struct bench *b,
                           struct fail *why)
{
    if (!o->background)
        return wait_for(b, b->fetcher.finished, o->seconds, why);
    return wait_for(b, b->filler.finished, 0, why) &&
           page_filler_join(&b->filler, why);
}

static bool end(struct bench *b, struct fail *why)
{
    eventfd_write(b->fetcher.stop, 1);
    return page_fetcher_join(&b->fetcher, why);
}

static void add_times(const struct bench *b, struct figures *f, double sign)
{
    f->elapsed += sign * clock_seconds();
    f->server_cpu_seconds += sign * cpu_of_process(b->server.pid);
    f->vcpu_seconds += sign * limit_guest_vcpu_seconds(&b->guest);
}

static bool measure(const struct fault_options *o, struct bench *b,
                    struct figures *f, struct fail *why)
{
    if (!prepare(o, b, why))
        return false;
    add_times(b, f, -1);
    if (!start(o, b, why))
        return false;
    f->before = *limit_guest_report(&b->guest);
    if (!wait_for_pages(o, b, why))
        return false;
    add_times(b, f, +1);
    f->after = *limit_guest_report(&b->guest);
    f->own_bytes = memory_own(getpid());
    f->server_own_bytes = memory_own(b->server.pid);
    return end(b, why);
}

/* The raw bytes, as tests/support/report.py reads them. */
static bool save_report(const char *directory, const char *name,
                        const struct report *r, struct fail *why)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof(path), "%s/%s", directory, name);
    FILE *file;
    bool written;

    if (length < 0 || (size_t)length >= sizeof(path))
        return fail(why, "the path of --reports is too long");
    file = fopen(path, "we");
    if (!file)
        return fail(why, "cannot open %s: %s", path, strerror(errno));
    written = fwrite(r, sizeof(*r), 1, file) == 1;
    if (fclose(file) != 0 || !written)
        return fail(why, "cannot write %s: %s", path, strerror(errno));
    return true;
}

static bool save_reports(const char *directory, const struct figures *f,
                         struct fail *why)
{
    return !directory || (save_report(directory, "before", &f->before, why) &&
                          save_report(directory, "after", &f->after, why));
}

/* Printing */

static uint64_t count(const struct report *r, unsigned bucket)
{
    uint64_t sum = 0;

    for (unsigned v = 0; v < REPORT_VCPUS; v++)
        sum += r->vcpus[v].histogram[bucket];
    return sum;
}

/* Accesses by duration; buckets as in guest/report.h. */
static void print_histogram(const struct figures *f)
{
    const char *comma = "";

    printf("\"histogram\": {");
    for (unsigned i = 0; i < REPORT_BUCKETS; i++) {
        uint64_t n = count(&f->after, i) - count(&f->before, i);

        if (n == 0)
            continue;
        printf("%s\"%u\": %llu", comma, i, (unsigned long long)n);
        comma = ", ";
    }
    printf("}");
}

static uint64_t wrong_pages(const struct report *r)
{
    uint64_t sum = 0;

    for (unsigned v = 0; v < REPORT_VCPUS; v++)
        sum += r->vcpus[v].counters.wrong;
    return sum;
}

static void print_timeline(const struct page_filler *f)
{
    printf("\"timeline\": [");
    for (size_t i = 0; i < f->sample_count; i++)
        printf("%s[%.6f, %llu]", i ? ", " : "", f->samples[i].seconds,
               (unsigned long long)f->samples[i].bytes);
    printf("]");
}

static void print_figures(const struct bench *b, const struct figures *f)
{
    const struct limit_guest *g = &b->guest;

    printf("{\"seconds\": %.6f, \"faults\": %llu, \"area_bytes\": %llu, "
           "\"wrong\": %llu, \"handler_cpu_seconds\": %.6f, "
           "\"background_cpu_seconds\": %.6f, \"server_cpu_seconds\": %.6f, "
           "\"vcpu_seconds\": %.6f, \"own_bytes\": %llu, "
           "\"server_own_bytes\": %llu, \"tsc_khz\": %llu, ",
           f->elapsed, (unsigned long long)b->fetcher.faults,
           (unsigned long long)(g->area_end - g->area_start),
           (unsigned long long)wrong_pages(&f->after), b->fetcher.cpu_seconds,
           b->filler.cpu_seconds, f->server_cpu_seconds, f->vcpu_seconds,
           (unsigned long long)f->own_bytes,
           (unsigned long long)f->server_own_bytes,
           (unsigned long long)f->after.header.tsc_khz);
    print_timeline(&b->filler);
    printf(", ");
    print_histogram(f);
    printf("}\n");
}

/* vCPUs run, perhaps on missing pages: nothing else is to be undone. */
static _Noreturn void end_process(struct bench *b, int status)
{
    page_server_stop(&b->server);
    fflush(NULL);
    _exit(status);
}

int main(int argc, char **argv)
{
    static struct bench bench;
    static struct figures figures;
    struct fault_options options;
    struct fail why;

    signal(SIGPIPE, SIG_IGN);
    if (!fault_options_parse(argc, argv, &options, &why)) {
        fprintf(stderr, "limit_fault: %s\n", why.text);
        return 2;
    }
    if (!measure(&options, &bench, &figures, &why) ||
        !save_reports(options.reports, &figures, &why)) {
        fprintf(stderr, "limit_fault: %s\n", why.text);
        end_process(&bench, 1);
    }
    print_figures(&bench, &figures);
    end_process(&bench, 0);
}
