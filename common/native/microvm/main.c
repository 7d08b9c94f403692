/*
 * microvm: a small VMM that hands its guest to a migration daemon over the
 * attach protocol. See --help below and docs/attach-protocol.md.
 */
#include "boot.h"
#include "control.h"
#include "process.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

static const char help[] =
    "usage: microvm --attach SOCKET --memory SIZE (--kernel ELF | --incoming)\n"
    "               [option ...]\n"
    "\n"
    "Run a guest and attach it to the migration daemon listening at SOCKET.\n"
    "\n"
    "  --attach SOCKET      unix socket of srcd or dstd\n"
    "  --memory SIZE        RAM in bytes; K, M or G for powers of 1024\n"
    "  --hugepages 2M       RAM of 2 MiB huge pages (vm.nr_hugepages)\n"
    "  --vcpus N            1 to 8; 1 without it\n"
    "  --accel ACCEL        kvm; process (threads run the test guest's work);\n"
    "                       or auto: kvm where it can be used\n"
    "  --machine NAME       machine name, equal at both ends; postcopyd-1\n"
    "  --kernel ELF         boot this 64-bit ELF at its PVH entry\n"
    "  --append TEXT        command line of the kernel\n"
    "  --incoming           wait for a guest to come in instead of booting\n"
    "  --serial OUTPUT      stdout or file:PATH\n"
    "  --paused             do not start the guest; the daemon does\n"
    "  --help               this text\n";

enum accel { ACCEL_AUTO, ACCEL_KVM, ACCEL_PROCESS };

struct options {
    const char *attach;
    const char *machine;
    const char *kernel;
    const char *append;
    const char *serial;
    uint64_t memory;
    uint64_t page_size;
    unsigned vcpus;
    enum accel accel;
    bool incoming;
    bool paused;
};

/* Options */

static bool parse_size(const char *text, uint64_t *size)
{
    static const char units[] = "KMG";
    unsigned long long number;
    const char *unit;
    char *end;

    errno = 0;
    number = strtoull(text, &end, 10);
    if (end == text || text[0] == '-' || errno)
        return false;
    if (*end) {
        unit = strchr(units, *end);
        if (!unit || end[1] || number > 1ull << 32)
            return false;
        number <<= 10 * (unit - units + 1);
    }
    *size = number;
    return true;
}

static bool parse_memory(const char *text, struct options *o, struct fail *why)
{
    if (!parse_size(text, &o->memory) || o->memory < 8u << 20 ||
        o->memory > 1ull << 40)
        return fail(why, "--memory is 8M to 1024G, not '%s'", text);
    return true;
}

static bool parse_vcpus(const char *text, struct options *o, struct fail *why)
{
    uint64_t number;

    if (!parse_size(text, &number) || number < 1 || number > STATE_VCPUS_MAX)
        return fail(why, "--vcpus is 1 to %u, not '%s'", STATE_VCPUS_MAX, text);
    o->vcpus = (unsigned)number;
    return true;
}

static bool parse_accel(const char *text, struct options *o, struct fail *why)
{
    static const char *const words[] = {
        [ACCEL_AUTO] = "auto", [ACCEL_KVM] = "kvm", [ACCEL_PROCESS] = "process"
    };

    for (unsigned i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (strcmp(text, words[i]) == 0) {
            o->accel = (enum accel)i;
            return true;
        }
    }
    return fail(why, "--accel is kvm, process or auto, not '%s'", text);
}

static bool parse_hugepages(const char *text, struct options *o,
                            struct fail *why)
{
    if (strcmp(text, "2M") != 0)
        return fail(why, "--hugepages is 2M, not '%s'", text);
    o->page_size = RAM_HUGE_PAGE;
    return true;
}

static bool check_options(const struct options *o, struct fail *why)
{
    if (!o->attach)
        return fail(why, "--attach SOCKET is missing");
    if (strlen(o->attach) >= sizeof(((struct sockaddr_un *)0)->sun_path))
        return fail(why, "the path of the socket is too long: %s", o->attach);
    if (!o->memory)
        return fail(why, "--memory SIZE is missing");
    if (o->memory % o->page_size != 0)
        return fail(why, "--memory is no multiple of the page size %llu",
                    (unsigned long long)o->page_size);
    if (!o->kernel == !o->incoming)
        return fail(why, "exactly one of --kernel and --incoming is needed");
    return true;
}

/* True also for --help, with `attach` left NULL. */
static bool parse_options(int argc, char **argv, struct options *o,
                          struct fail *why)
{
    enum {
        ATTACH,
        MEMORY,
        HUGEPAGES,
        VCPUS,
        ACCEL,
        MACHINE,
        KERNEL,
        APPEND,
        INCOMING,
        SERIAL,
        PAUSED,
        HELP
    };
    static const struct option known[] = {
        { "attach", required_argument, NULL, ATTACH },
        { "memory", required_argument, NULL, MEMORY },
        { "hugepages", required_argument, NULL, HUGEPAGES },
        { "vcpus", required_argument, NULL, VCPUS },
        { "accel", required_argument, NULL, ACCEL },
        { "machine", required_argument, NULL, MACHINE },
        { "kernel", required_argument, NULL, KERNEL },
        { "append", required_argument, NULL, APPEND },
        { "incoming", no_argument, NULL, INCOMING },
        { "serial", required_argument, NULL, SERIAL },
        { "paused", no_argument, NULL, PAUSED },
        { "help", no_argument, NULL, HELP },
        { 0 },
    };
    bool good = true;
    int option;

    *o = (struct options){ .machine = "postcopyd-1",
                           .append = "",
                           .serial = "stdout",
                           .page_size = RAM_SMALL_PAGE,
                           .vcpus = 1 };
    while (good && (option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (option) {
        case ATTACH:
            o->attach = optarg;
            break;
        case MEMORY:
            good = parse_memory(optarg, o, why);
            break;
        case HUGEPAGES:
            good = parse_hugepages(optarg, o, why);
            break;
        case VCPUS:
            good = parse_vcpus(optarg, o, why);
            break;
        case ACCEL:
            good = parse_accel(optarg, o, why);
            break;
        case MACHINE:
            o->machine = optarg;
            break;
        case KERNEL:
            o->kernel = optarg;
            break;
        case APPEND:
            o->append = optarg;
            break;
        case INCOMING:
            o->incoming = true;
            break;
        case SERIAL:
            o->serial = optarg;
            break;
        case PAUSED:
            o->paused = true;
            break;
        case HELP:
            o->attach = NULL;
            return true;
        default:
            return fail(why, "see microvm --help");
        }
    }
    if (good && optind < argc)
        return fail(why, "what is '%s'? See microvm --help", argv[optind]);
    return good && check_options(o, why);
}

/* The guest */

struct guest {
    struct ram ram;
    struct serial serial;
    struct engine *engine;
    struct vm vm;
    struct process process;
};

static enum accel choose_accel(enum accel wanted)
{
    struct fail why;

    if (wanted != ACCEL_AUTO)
        return wanted;
    if (vm_is_possible(&why))
        return ACCEL_KVM;
    fprintf(stderr, "microvm: the guest runs as threads of this process: %s\n",
            why.text);
    return ACCEL_PROCESS;
}

/* What the test guest can't find out; other kernels ignore it. */
static bool add_facts(char *line, size_t size, const struct options *o,
                      uint64_t tsc_khz, struct fail *why)
{
    int length = snprintf(line, size, "%s vcpus=%u tsc-khz=%llu", o->append,
                          o->vcpus, (unsigned long long)tsc_khz);

    if (length < 0 || (size_t)length >= size)
        return fail(why, "--append is too long");
    return true;
}

static bool create_kvm(struct guest *g, const struct options *o,
                       struct fail *why)
{
    char line[COMMAND_LINE_MAX];

    g->engine = &g->vm.engine;
    return vm_create(&g->vm, &g->ram, o->vcpus, &g->serial, why) &&
           (o->incoming ||
            (add_facts(line, sizeof(line), o, vm_tsc_khz(&g->vm), why) &&
             boot_kernel(&g->vm, &g->ram, o->kernel, line, why)));
}

static bool create_process(struct guest *g, const struct options *o,
                           struct fail *why)
{
    g->engine = &g->process.engine;
    return process_create(&g->process, &g->ram, o->vcpus, &g->serial, why) &&
           (o->incoming || process_boot(&g->process, o->append, why));
}

static bool create_guest(struct guest *g, const struct options *o,
                         struct fail *why)
{
    enum accel accel = choose_accel(o->accel);
    bool kvm = accel == ACCEL_KVM;

    return serial_open(&g->serial, o->serial, why) &&
           ram_create(&g->ram, o->memory, o->page_size, kvm, why) &&
           (kvm ? create_kvm(g, o, why) : create_process(g, o, why));
}

static enum guest_state first_state(const struct options *o)
{
    if (o->incoming)
        return GUEST_INCOMING;
    return o->paused ? GUEST_PAUSED : GUEST_RUNNING;
}

static bool run(const struct options *o, struct fail *why)
{
    /* The guest's threads run until the process ends, after this returns. */
    static struct guest guest;
    static struct control control;

    if (!create_guest(&guest, o, why))
        return false;
    control.path = o->attach;
    control.machine = o->machine;
    control.ram = &guest.ram;
    control.engine = guest.engine;
    control.state = first_state(o);
    return control_run(&control, why);
}

int main(int argc, char **argv)
{
    struct options options;
    struct fail why;

    signal(SIGPIPE, SIG_IGN);
    if (!parse_options(argc, argv, &options, &why)) {
        fprintf(stderr, "microvm: %s\n", why.text);
        return 2;
    }
    if (!options.attach) {
        fputs(help, stdout);
        return 0;
    }
    if (!run(&options, &why)) {
        fprintf(stderr, "microvm: %s\n", why.text);
        return 1;
    }
    return 0;
}
