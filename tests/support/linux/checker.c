/*
 * What runs in the Linux guest of the tests and of the demo.
 *
 *   checker count          "c N" every 20 ms
 *   checker memory [N]     "h CYCLE ok" after every look at all of its memory,
 *                          or "h CYCLE wrong COUNT first PAGE"; between two of
 *                          its pages lie N full ones that it never looks at
 *   checker disk DEVICE    "d N ok" after every sector, or "d N wrong SECTOR"
 *   checker log            "k TEXT" for every complaint of the kernel
 *   checker fill MIB       ends when so much memory is full, and stays so
 *
 * Every line is one write, so that lines of several processes don't mix.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))
#define MIB (1UL << 20)
#define SEEDED_PAGES (64 * MIB / PAGE)
#define STAMPED_PAGES (16 * MIB / PAGE)
#define COUNT_MS 20
#define DISK_MS 40
#define SECTOR 512
#define PAUSE_PAGES 512 /* between two rests of the memory check */
#define WARNING 4       /* of the kernel's log levels; 3 and less is worse */

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
    char line[512];
    va_list values;

    va_start(values, format);
    int length = vsnprintf(line, sizeof(line), format, values);
    va_end(values);
    if (length < 0)
        return;
    size_t size = (size_t)length;
    if (size > sizeof(line) - 1)
        size = sizeof(line) - 1;
    while (write(STDOUT_FILENO, line, size) < 0 && errno == EINTR)
        ;
}

static void rest(long milliseconds)
{
    struct timespec time = { .tv_nsec = milliseconds * 1000000 };

    nanosleep(&time, NULL);
}

/* What word `number` holds in generation `generation`. */
static uint64_t pattern(uint64_t number, uint64_t generation)
{
    uint64_t mixed = (number + 1) * 0x9e3779b97f4a7c15;

    return mixed ^ (mixed >> 29) ^ (generation * 0xbf58476d1ce4e5b9);
}

static void write_page(uint64_t *page, uint64_t first, uint64_t generation)
{
    for (size_t i = 0; i < WORDS; i++)
        page[i] = pattern(first + i, generation);
}

static bool page_is_right(const uint64_t *page, uint64_t first,
                          uint64_t generation)
{
    for (size_t i = 0; i < WORDS; i++)
        if (page[i] != pattern(first + i, generation))
            return false;
    return true;
}

/* Pages that are full and never looked at. */
static uint64_t *fill_pages(uint64_t *memory, size_t pages)
{
    for (size_t page = 0; page < pages; page++)
        write_page(memory + page * WORDS, page * WORDS, 2);
    return memory + pages * WORDS;
}

/* What a look at the memory has found. */
struct found {
    uint64_t wrong;
    uint64_t first; /* page; the stamped ones follow the seeded ones */
};

static void note(struct found *found, uint64_t page)
{
    if (found->wrong++ == 0)
        found->first = page;
}

static uint64_t *map(size_t pages)
{
    void *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        say("h 0 wrong: no memory\n");
        exit(1);
    }
    return memory;
}

/*
 * Seeded pages keep what they have got at the start. Stamped ones are written
 * anew with a higher generation after each look at them; which one each has is
 * kept elsewhere, so a page out of the past is seen.
 */
static void look(const uint64_t *seeded, uint64_t *stamped,
                 uint64_t *generations, struct found *found)
{
    const size_t ratio = SEEDED_PAGES / STAMPED_PAGES;

    for (size_t page = 0; page < SEEDED_PAGES; page++) {
        if (!page_is_right(seeded + page * WORDS, page * WORDS, 0))
            note(found, page);
        if (page % PAUSE_PAGES == 0)
            rest(5);
        if (page % ratio != 0)
            continue;
        size_t other = page / ratio;
        uint64_t *stamp = stamped + other * WORDS;
        if (!page_is_right(stamp, other, generations[other]))
            note(found, SEEDED_PAGES + other);
        write_page(stamp, other, ++generations[other]);
    }
}

static void check_memory(size_t between)
{
    uint64_t *seeded = map(SEEDED_PAGES);
    uint64_t *stamped = map(STAMPED_PAGES);
    uint64_t *generations = map(STAMPED_PAGES * sizeof(uint64_t) / PAGE);
    uint64_t *others =
        between ? map((SEEDED_PAGES + STAMPED_PAGES) * between) : NULL;

    for (size_t page = 0; page < SEEDED_PAGES; page++) {
        write_page(seeded + page * WORDS, page * WORDS, 0);
        others = fill_pages(others, between);
    }
    for (size_t page = 0; page < STAMPED_PAGES; page++) {
        write_page(stamped + page * WORDS, page, 0);
        others = fill_pages(others, between);
    }
    for (uint64_t cycle = 1;; cycle++) {
        struct found found = { 0 };
        look(seeded, stamped, generations, &found);
        if (found.wrong == 0)
            say("h %" PRIu64 " ok\n", cycle);
        else
            say("h %" PRIu64 " wrong %" PRIu64 " first %" PRIu64 "\n", cycle,
                found.wrong, found.first);
    }
}

static void count(void)
{
    for (uint64_t number = 1;; number++) {
        say("c %" PRIu64 "\n", number);
        rest(COUNT_MS);
    }
}

/* Sectors are written and read back, one after the other, past any cache. */
static void check_disk(const char *device)
{
    int disk = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);
    off_t size = lseek(disk, 0, SEEK_END);
    uint64_t *memory = map(2);
    uint64_t *written = memory;
    uint64_t *read = memory + WORDS;

    if (size < SECTOR) {
        say("d 0 wrong: %s: %s\n", device, strerror(errno));
        exit(1);
    }
    for (uint64_t number = 1;; number++) {
        off_t offset = (off_t)number * SECTOR % size;
        write_page(written, number, 1);
        bool good = pwrite(disk, written, SECTOR, offset) == SECTOR &&
                    pread(disk, read, SECTOR, offset) == SECTOR &&
                    memcmp(read, written, SECTOR) == 0;
        say("d %" PRIu64 " %s\n", number, good ? "ok" : "wrong");
        rest(DISK_MS);
    }
}

/* Passes on what the kernel says from now on, if it is a warning or worse. */
static void read_log(void)
{
    int log = open("/dev/kmsg", O_RDONLY | O_CLOEXEC);
    char record[8192];

    lseek(log, 0, SEEK_END);
    for (;;) {
        ssize_t length = read(log, record, sizeof(record) - 1);
        if (length <= 0)
            continue;
        record[length] = '\0';
        const char *text = strchr(record, ';');
        if ((strtoul(record, NULL, 10) & 7) <= WARNING && text != NULL)
            say("k %.*s\n", (int)strcspn(text + 1, "\n"), text + 1);
    }
}

/* Memory that is there to be moved: a child has it and never looks at it. */
static void fill(size_t mib)
{
    size_t pages = mib * (MIB / PAGE);

    fill_pages(map(pages), pages);
    if (fork() == 0)
        for (;;)
            pause();
    exit(0);
}

int main(int count_of_words, char **words)
{
    const char *task = count_of_words > 1 ? words[1] : "";

    if (strcmp(task, "count") == 0)
        count();
    if (strcmp(task, "disk") == 0 && count_of_words > 2)
        check_disk(words[2]);
    if (strcmp(task, "fill") == 0 && count_of_words > 2)
        fill(strtoul(words[2], NULL, 10));
    if (strcmp(task, "log") == 0)
        read_log();
    if (strcmp(task, "memory") == 0) {
        setpriority(PRIO_PROCESS, 0, 19); /* counting goes first */
        check_memory(count_of_words > 2 ? strtoul(words[2], NULL, 10) : 0);
    }
    return 2;
}
