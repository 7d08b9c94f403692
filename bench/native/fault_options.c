#include "fault_options.h"
#include "options.h"

#include <getopt.h>

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

static bool check_options(const struct fault_options *o, struct fail *why)
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

bool fault_options_parse(int argc, char **argv, struct fault_options *o,
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

    *o = (struct fault_options){ .guest = { .append = "",
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
