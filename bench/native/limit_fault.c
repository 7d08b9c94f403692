/*
 * limit_fault: what a page fault over TCP costs the guest that waits for it,
 * with nothing in between that a migration needs. See --help.
 */
#include "account.h"
#include "limit_guest.h"
#include "memory.h"
#include "options.h"
#include "page_client.h"
#include "tcp.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static const char help[] =
    "usage: limit_fault --kernel ELF [option ...]\n"
    "\n"
    "Fill a guest's area, empty it, and bring its pages back over TCP.\n"
    "\n"
    "  --kernel ELF         the test guest\n"
    "  --append TEXT        its command line: area=SIZE read-only ...\n"
    "  --memory SIZE        RAM in bytes; K, M, G; 1G\n"
    "  --hugepages          RAM of 2 MiB huge pages\n"
    "  --vcpus N            1 to 8; 1\n"
    "  --serial OUTPUT      stdout or file:PATH; nowhere\n"
    "  --background         all pages come in order on a second connection;\n"
    "                       the end is when the last one is there\n"
    "  --rate SIZE          limit of these, bytes per second\n"
    "  --faults N           without --background: end after N faults\n"
    "  --seconds N          without --background: end after N seconds; 10\n"
    "  --relay              print 'listening HOST:PORT', read a line "
    "HOST:PORT\n"
    "                       from standard input; the server connects to that\n"
    "  --reports DIRECTORY  put the guest's report before and after there\n";

#define HOST_MAX 63

struct options {
    struct limit_guest_options guest;
    bool background;
    bool relay;
    const char *reports;
    uint64_t rate;
    uint64_t faults;
    unsigned seconds;
};

struct figures {
    double elapsed;
    double server_cpu_seconds;
    double vcpu_seconds;
    uint64_t server_own_bytes;
    uint64_t own_bytes;
    uint64_t wrong;
    uint64_t histogram[REPORT_BUCKETS];
};

/* All that is there, static: threads run until the process ends. */
struct bench {
    struct limit_guest guest;
    struct page_server server;
    struct page_fetcher fetcher;
    struct page_filler filler;
};

/* Options */

static bool check_options(const struct options *o, struct fail *why)
{
    if (!o->guest.kernel)
        return fail(why, "--kernel ELF is missing");
    if (o->guest.memory < 8u << 20)
        return fail(why, "--memory is at least 8M");
    if (o->guest.memory % o->guest.page_size != 0)
        return fail(why, "--memory is no multiple of the page size");
    if (o->guest.vcpus == 0)
        return fail(why, "--vcpus is 1 to %u", STATE_VCPUS_MAX);
    return true;
}

static bool parse_options(int argc, char **argv, struct options *o,
                          struct fail *why)
{
    enum {
        KERNEL,
        APPEND,
        MEMORY,
        HUGEPAGES,
        VCPUS,
        SERIAL,
        BACKGROUND,
        RATE,
        FAULTS,
        SECONDS,
        RELAY,
        REPORTS
    };
    static const struct option known[] = {
        { "kernel", required_argument, NULL, KERNEL },
        { "append", required_argument, NULL, APPEND },
        { "memory", required_argument, NULL, MEMORY },
        { "hugepages", no_argument, NULL, HUGEPAGES },
        { "vcpus", required_argument, NULL, VCPUS },
        { "serial", required_argument, NULL, SERIAL },
        { "background", no_argument, NULL, BACKGROUND },
        { "rate", required_argument, NULL, RATE },
        { "faults", required_argument, NULL, FAULTS },
        { "seconds", required_argument, NULL, SECONDS },
        { "relay", no_argument, NULL, RELAY },
        { "reports", required_argument, NULL, REPORTS },
        { 0 },
    };
    struct limit_guest_options *g = &o->guest;
    bool good = true;
    int option;

    *o = (struct options){ .guest = { .append = "",
                                      .serial = "file:/dev/null",
                                      .memory = 1u << 30,
                                      .page_size = RAM_SMALL_PAGE,
                                      .vcpus = 1 },
                           .seconds = 10 };
    while (good && (option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (option) {
        case KERNEL:
            g->kernel = optarg;
            break;
        case APPEND:
            g->append = optarg;
            break;
        case MEMORY:
            good = option_size("--memory", optarg, 1ull << 38, &g->memory, why);
            break;
        case HUGEPAGES:
            g->page_size = RAM_HUGE_PAGE;
            break;
        case VCPUS:
            good = option_count("--vcpus", optarg, STATE_VCPUS_MAX, &g->vcpus,
                                why);
            break;
        case SERIAL:
            g->serial = optarg;
            break;
        case BACKGROUND:
            o->background = true;
            break;
        case RATE:
            good = option_size("--rate", optarg, 1ull << 40, &o->rate, why);
            break;
        case FAULTS:
            good = option_size("--faults", optarg, 1ull << 40, &o->faults, why);
            break;
        case SECONDS:
            good = option_count("--seconds", optarg, 3600, &o->seconds, why);
            break;
        case RELAY:
            o->relay = true;
            break;
        case REPORTS:
            o->reports = optarg;
            break;
        default:
            return fail(why, "%s", help);
        }
    }
    return good && check_options(o, why);
}

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

static bool find_address(const struct options *o, struct bench *b,
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
static uint64_t fault_limit(const struct options *o,
                            const struct page_target *t)
{
    uint64_t pages = (t->end - t->start) / t->page_size;

    return o->faults && o->faults < pages ? o->faults : pages;
}

static bool connect_all(const struct options *o, struct bench *b,
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
static bool prepare(const struct options *o, struct bench *b, struct fail *why)
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

static bool run(const struct options *o, struct bench *b, struct fail *why)
{
    bool waited;

    if (!page_fetcher_start(&b->fetcher, why) ||
        (o->background && !page_filler_start(&b->filler, why)))
        return false;
    gate_open(&b->guest.vm.engine.gate);
    if (o->background)
        waited = wait_for(b, b->filler.finished, 0, why) &&
                 page_filler_join(&b->filler, why);
    else
        waited = wait_for(b, b->fetcher.finished, o->seconds, why);
    return waited;
}

static bool end(struct bench *b, struct fail *why)
{
    eventfd_write(b->fetcher.stop, 1);
    return page_fetcher_join(&b->fetcher, why);
}

/* The raw bytes, as tests/support/report.py reads them. */
static bool save_report(const struct options *o, const struct limit_guest *g,
                        const char *name, struct fail *why)
{
    char path[PATH_MAX];
    FILE *file;
    bool written;

    if (!o->reports)
        return true;
    snprintf(path, sizeof(path), "%s/%s", o->reports, name);
    file = fopen(path, "we");
    if (!file)
        return fail(why, "cannot open %s: %s", path, strerror(errno));
    written = fwrite(limit_guest_report(g), sizeof(struct report), 1, file);
    if (fclose(file) != 0 || !written)
        return fail(why, "cannot write %s: %s", path, strerror(errno));
    return true;
}

/* Accesses of all vCPUs by duration: -1 before and +1 after are the between. */
static void add_report(const struct limit_guest *g, struct figures *f, int sign)
{
    const struct report *r = limit_guest_report(g);

    for (unsigned v = 0; v < g->vm.engine.vcpus; v++) {
        for (unsigned i = 0; i < REPORT_BUCKETS; i++)
            f->histogram[i] += (uint64_t)sign * r->vcpus[v].histogram[i];
        f->wrong += (uint64_t)sign * r->vcpus[v].counters.wrong;
    }
}

static void add_times(const struct bench *b, struct figures *f, double sign)
{
    f->elapsed += sign * clock_seconds();
    f->server_cpu_seconds += sign * cpu_of_process(b->server.pid);
    f->vcpu_seconds += sign * limit_guest_vcpu_seconds(&b->guest);
}

static bool measure(const struct options *o, struct bench *b, struct figures *f,
                    struct fail *why)
{
    if (!prepare(o, b, why) || !save_report(o, &b->guest, "before", why))
        return false;
    add_report(&b->guest, f, -1);
    add_times(b, f, -1);
    if (!run(o, b, why))
        return false;
    add_times(b, f, +1);
    add_report(&b->guest, f, +1);
    f->own_bytes = memory_own(getpid());
    f->server_own_bytes = memory_own(b->server.pid);
    return end(b, why) && save_report(o, &b->guest, "after", why);
}

/* Printing */

static void print_histogram(const struct figures *f)
{
    const char *comma = "";

    printf("\"histogram\": {");
    for (unsigned i = 0; i < REPORT_BUCKETS; i++) {
        if (f->histogram[i] == 0)
            continue;
        printf("%s\"%u\": %llu", comma, i, (unsigned long long)f->histogram[i]);
        comma = ", ";
    }
    printf("}");
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
           (unsigned long long)f->wrong, b->fetcher.cpu_seconds,
           b->filler.cpu_seconds, f->server_cpu_seconds, f->vcpu_seconds,
           (unsigned long long)f->own_bytes,
           (unsigned long long)f->server_own_bytes,
           (unsigned long long)limit_guest_report(g)->header.tsc_khz);
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
    struct options options;
    struct fail why;

    signal(SIGPIPE, SIG_IGN);
    if (!parse_options(argc, argv, &options, &why)) {
        fprintf(stderr, "limit_fault: %s\n", why.text);
        return 2;
    }
    if (!measure(&options, &bench, &figures, &why)) {
        fprintf(stderr, "limit_fault: %s\n", why.text);
        end_process(&bench, 1);
    }
    print_figures(&bench, &figures);
    end_process(&bench, 0);
}
