/*
 * limit_stream: pages over TCP into memory, by one of several ways, with
 * nothing in between that a migration needs. See --help.
 */
#include "account.h"
#include "options.h"
#include "stream_source.h"
#include "stream_ways.h"
#include "tcp.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static const char help[] =
    "usage: limit_stream --way WAY [option ...]\n"
    "\n"
    "Send pages over loopback TCP into memory that a guest would see.\n"
    "\n"
    "  --way WAY            discard, copy, fresh, inplace-2m, inplace-4k,\n"
    "                       buffer-2m or write-2m\n"
    "  --size SIZE          bytes, a multiple of 2M; K, M, G; 512M\n"
    "  --batch PAGES        pages for each call that sends: a power of two,\n"
    "                       1 to 512; 256\n"
    "  --congestion NAME    congestion control; the machine's\n";

struct options {
    const struct way *way;
    struct stream_source source;
};

struct figures {
    double prepare_seconds;
    double prepare_cpu_seconds;
    double seconds;
    double receiver_cpu_seconds; /* with the preparation */
    struct stream_account sender;
    uint64_t wrong;
};

/* Options */

static bool check_options(const struct options *o, struct fail *why)
{
    if (!o->way)
        return fail(why, "--way is one of %s", way_names());
    if (o->source.length == 0 || o->source.length % HUGE_PAGE != 0)
        return fail(why, "--size is a multiple of 2M");
    if (o->source.batch == 0 || RECORDS_MAX % o->source.batch != 0)
        return fail(why, "--batch is a power of two, 1 to %u", RECORDS_MAX);
    return true;
}

static bool parse_options(int argc, char **argv, struct options *o,
                          struct fail *why)
{
    enum { WAY, SIZE, BATCH, CONGESTION };
    static const struct option known[] = {
        { "way", required_argument, NULL, WAY },
        { "size", required_argument, NULL, SIZE },
        { "batch", required_argument, NULL, BATCH },
        { "congestion", required_argument, NULL, CONGESTION },
        { 0 },
    };
    bool good = true;
    int option;

    *o = (struct options){ .source = { .length = 512u << 20, .batch = 256 } };
    while (good && (option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (option) {
        case WAY:
            o->way = way_find(optarg);
            break;
        case SIZE:
            good = option_size("--size", optarg, 1ull << 38, &o->source.length,
                               why);
            break;
        case BATCH:
            good = option_count("--batch", optarg, RECORDS_MAX,
                                &o->source.batch, why);
            break;
        case CONGESTION:
            o->source.congestion = optarg;
            break;
        default:
            return fail(why, "%s", help);
        }
    }
    return good && check_options(o, why);
}

/* Measuring */

/* In a process of its own, which ends with this one. */
static bool start_source(const struct stream_source *s, pid_t *child,
                         uint16_t *port, struct fail *why)
{
    int listener = tcp_listen(port, why);

    if (listener < 0)
        return false;
    *child = fork();
    if (*child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (!stream_source_run(s, listener, why))
            fprintf(stderr, "limit_stream: the sender: %s\n", why->text);
        _exit(0);
    }
    close(listener);
    return *child > 0 ||
           fail(why, "cannot start the sender: %s", strerror(errno));
}

static bool prepare(const struct way *way, struct landing *l, struct figures *f,
                    struct fail *why)
{
    double start = clock_seconds(), cpu = cpu_of_this_process();

    if (way->prepare && !way->prepare(l, why))
        return false;
    f->prepare_seconds = clock_seconds() - start;
    f->prepare_cpu_seconds = cpu_of_this_process() - cpu;
    return true;
}

static bool take_all(const struct way *way, struct landing *l, int fd,
                     struct fail *why)
{
    uint64_t pages = l->length / SMALL_PAGE;

    for (uint64_t page = 0; page < pages; page += way->batch) {
        if (!way->take(l, fd, page, way->batch, why))
            return false;
    }
    return true;
}

static bool stream(const struct way *way, struct landing *l, int fd,
                   struct figures *f, struct fail *why)
{
    double start = clock_seconds(), cpu = cpu_of_this_process();

    if (!tcp_send_bytes(fd, "", 1, why) || !take_all(way, l, fd, why))
        return false;
    f->seconds = clock_seconds() - start;
    f->receiver_cpu_seconds =
        cpu_of_this_process() - cpu + f->prepare_cpu_seconds;
    return tcp_receive_bytes(fd, &f->sender, sizeof(f->sender), why);
}

static bool receive(const struct options *o, uint16_t port, struct figures *f,
                    struct fail *why)
{
    static struct landing landing;
    int fd = tcp_connect("127.0.0.1", port, why);
    char ready;

    if (fd < 0 || !tcp_set_congestion(fd, o->source.congestion, why) ||
        !tcp_receive_bytes(fd, &ready, sizeof(ready), why))
        return false;
    return landing_create(&landing, o->source.length, why) &&
           prepare(o->way, &landing, f, why) && landing_watch(&landing, why) &&
           stream(o->way, &landing, fd, f, why) &&
           (!o->way->keeps || landing_count_wrong(&landing, &f->wrong, why));
}

static bool measure(const struct options *o, struct figures *f,
                    struct fail *why)
{
    uint16_t port;
    pid_t child;
    bool good;

    *f = (struct figures){ 0 };
    if (!memory_warm_up(3 * o->source.length, why) ||
        !start_source(&o->source, &child, &port, why))
        return false;
    good = receive(o, port, f, why);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return good;
}

static void print_figures(const struct options *o, const struct figures *f)
{
    printf("{\"way\": \"%s\", \"bytes\": %llu, \"seconds\": %.6f, "
           "\"sender_cpu_seconds\": %.6f, \"receiver_cpu_seconds\": %.6f, "
           "\"prepare_seconds\": %.6f, \"prepare_cpu_seconds\": %.6f, "
           "\"wrong\": %llu}\n",
           o->way->name, (unsigned long long)o->source.length, f->seconds,
           f->sender.cpu_seconds, f->receiver_cpu_seconds, f->prepare_seconds,
           f->prepare_cpu_seconds, (unsigned long long)f->wrong);
}

int main(int argc, char **argv)
{
    struct options options;
    struct figures figures;
    struct fail why;

    if (!parse_options(argc, argv, &options, &why)) {
        fprintf(stderr, "limit_stream: %s\n", why.text);
        return 2;
    }
    if (!measure(&options, &figures, &why)) {
        fprintf(stderr, "limit_stream: %s\n", why.text);
        return 1;
    }
    print_figures(&options, &figures);
    return 0;
}
