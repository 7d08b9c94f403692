#include "support.h"

#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* --- a guest's memory ---------------------------------------------------- */

static void *map_memory(int fd, uint64_t length)
{
    void *map =
        mmap(NULL, (size_t)length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    NEED(map != MAP_FAILED);
    NEED(madvise(map, (size_t)length, MADV_DONTFORK) == 0);
    return map;
}

void guest_open(struct guest *g, const struct block_spec *specs, uint32_t count)
{
    NEED(count <= BLOCKS);
    NEED(RESULT_IS_OK(ram_open(&g->ram, count)));
    for (uint32_t i = 0; i < count; i++) {
        bool huge = specs[i].page_size == HUGE && !specs[i].plain;
        int fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING |
                                           (huge ? MFD_HUGETLB : 0));

        NEED(fd >= 0);
        NEED(ftruncate(fd, (off_t)specs[i].length) == 0);
        g->memory[i] = map_memory(fd, specs[i].length);
        NEED(RESULT_IS_OK(ram_add(&g->ram, specs[i].idstr, specs[i].length,
                                  specs[i].page_size,
                                  (uint64_t)(uintptr_t)g->memory[i], fd)));
    }
}

void guest_close(struct guest *g)
{
    for (uint32_t i = 0; i < g->ram.count; i++) {
        munmap(g->memory[i], (size_t)g->ram.blocks[i].length);
        close(g->ram.blocks[i].fd);
    }
    ram_close(&g->ram);
}

uint64_t guest_allocated(const struct guest *g, uint32_t block)
{
    struct stat st;

    NEED(fstat(g->ram.blocks[block].fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512;
}

/* Pages beyond the pool are given back when nobody uses them any more. */
static void allow_surplus_pages(void)
{
    const char *path = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
                       "nr_overcommit_hugepages";
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd >= 0) {
        (void)!write(fd, "64", 2);
        close(fd);
    }
}

bool have_huge_pages(void)
{
    const size_t size = (size_t)(16 * HUGE);
    int fd = memfd_create("probe", MFD_CLOEXEC | MFD_HUGETLB);
    void *map = MAP_FAILED;

    if (fd >= 0 && ftruncate(fd, (off_t)size) == 0) {
        map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) {
            allow_surplus_pages();
            map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        }
    }
    if (map != MAP_FAILED) {
        munmap(map, size);
    }
    if (fd >= 0) {
        close(fd);
    }
    return map != MAP_FAILED;
}

int open_uffd(void)
{
    int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = (int)syscall(SYS_userfaultfd, flags);

    if (fd < 0 && errno == EPERM) {
        fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
    }
    return fd;
}

int open_ready_uffd(void)
{
    uint32_t abilities;
    int fd = open_uffd();

    NEED(fd >= 0);
    NEED(RESULT_IS_OK(uffd_negotiate(fd, &abilities)));
    return fd;
}

uint32_t thread_id(void)
{
    return (uint32_t)syscall(SYS_gettid);
}

/* A descriptor of another process, by its number there. */
static int fetch_descriptor(int pid, int number)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    int fd = -1;

    if (pidfd >= 0) {
        fd = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0);
        close(pidfd);
    }
    return fd;
}

struct made {
    uint64_t base;
    int64_t uffd;
};

static void stranger_main(int out, int memory, uint64_t length)
{
    struct made made = { .uffd = open_uffd() };

    /* Whoever waits for our output must not wait for ever. */
    NEED(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    made.base = (uint64_t)(uintptr_t)map_memory(memory, length);
    NEED(write(out, &made, sizeof(made)) == sizeof(made));
    for (;;) {
        pause();
    }
}

bool stranger_open(struct stranger *s, uint64_t length)
{
    struct made made;
    char path[64];
    int fds[2];

    *s = (struct stranger){ .length = length };
    s->memory = memfd_create("stranger", MFD_CLOEXEC);
    NEED(s->memory >= 0 && ftruncate(s->memory, (off_t)length) == 0);
    NEED(pipe(fds) == 0);
    s->pid = fork();
    NEED(s->pid >= 0);
    if (s->pid == 0) {
        stranger_main(fds[1], s->memory, length);
    }
    NEED(read(fds[0], &made, sizeof(made)) == sizeof(made));
    close(fds[0]);
    close(fds[1]);
    s->base = made.base;
    snprintf(path, sizeof(path), "/proc/%d/pagemap", s->pid);
    s->pagemap = open(path, O_RDONLY | O_CLOEXEC);
    s->uffd = fetch_descriptor(s->pid, (int)made.uffd);
    if (s->pagemap < 0 || s->uffd < 0) {
        stranger_kill(s);
        stranger_close(s);
        return false;
    }
    return true;
}

void stranger_kill(struct stranger *s)
{
    NEED(kill(s->pid, SIGKILL) == 0);
    NEED(waitpid(s->pid, NULL, 0) == s->pid);
}

void stranger_close(struct stranger *s)
{
    close(s->memory);
    if (s->pagemap >= 0) {
        close(s->pagemap);
    }
    if (s->uffd >= 0) {
        close(s->uffd);
    }
}

/* --- contents ------------------------------------------------------------ */

static uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= UINT64_C(0x9e3779b97f4a7c15);
    x ^= x >> 29;
    return x | 1;
}

void pattern_fill(void *page, uint64_t seed)
{
    uint64_t *words = page;

    for (uint64_t i = 0; i < PAGE / 8; i++) {
        words[i] = mix(seed + (i << 40));
    }
}

bool pattern_is(const void *page, uint64_t seed)
{
    uint8_t wanted[PAGE];

    pattern_fill(wanted, seed);
    return memcmp(page, wanted, PAGE) == 0;
}

bool is_all_zero(const void *page)
{
    const uint8_t *bytes = page;

    return bytes[0] == 0 && memcmp(bytes, bytes + 1, PAGE - 1) == 0;
}

uint64_t next_random(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return *state >> 33;
}

/* --- threads ------------------------------------------------------------- */

static void *job_main(void *arg)
{
    struct job *j = arg;

    j->result = j->run(j->arg);
    return NULL;
}

void job_start(struct job *j, struct result (*run)(void *arg), void *arg)
{
    *j = (struct job){ .run = run, .arg = arg };
    NEED(pthread_create(&j->thread, NULL, job_main, j) == 0);
}

struct result job_wait(struct job *j)
{
    NEED(pthread_join(j->thread, NULL) == 0);
    return j->result;
}

/* --- channels ------------------------------------------------------------ */

void make_pair(int fds[2])
{
    NEED(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
}

int make_event(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    NEED(fd >= 0);
    return fd;
}

void set_event(int fd)
{
    uint64_t one = 1;

    NEED(write(fd, &one, sizeof(one)) == sizeof(one));
}

bool is_readable(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    return poll(&p, 1, 0) > 0;
}

void line_open(struct line *l)
{
    int fds[2];

    make_pair(fds);
    l->fd = fds[0];
    l->peer = fds[1];
    l->stop_fd = make_event();
    NEED(RESULT_IS_OK(channel_open(&l->channel, l->fd, l->stop_fd)));
}

void line_finish(struct line *l)
{
    NEED(shutdown(l->fd, SHUT_RDWR) == 0);
}

void line_hang_up(struct line *l)
{
    close(l->peer);
    l->peer = -1;
}

void line_close(struct line *l)
{
    channel_close(&l->channel);
    close(l->fd);
    close(l->stop_fd);
    if (l->peer >= 0) {
        close(l->peer);
    }
}

void send_all(int fd, const void *data, size_t size)
{
    const uint8_t *at = data;

    while (size) {
        ssize_t n = send(fd, at, size, MSG_NOSIGNAL);

        NEED(n > 0);
        at += n;
        size -= (size_t)n;
    }
}

/* False at the end of the stream; true if there was nothing to read. */
static bool receive(int fd, void *data, size_t size)
{
    uint8_t *at = data;

    while (size) {
        ssize_t n = recv(fd, at, size, MSG_WAITALL);

        if (n <= 0) {
            return false;
        }
        at += n;
        size -= (size_t)n;
    }
    return true;
}

void receive_all(int fd, void *data, size_t size)
{
    NEED(receive(fd, data, size));
}

/* --- the stream, read independently -------------------------------------- */

void walker_open(struct walker *w, int fd, const struct ram *ram,
                 uint32_t section_id)
{
    *w = (struct walker){
        .fd = fd, .sections = true, .ram = ram, .section_id = section_id
    };
    for (uint32_t i = 0; i < ram->count; i++) {
        w->counts[i] = calloc(block_pages(&ram->blocks[i]), sizeof(uint32_t));
        w->images[i] = calloc(1, (size_t)ram->blocks[i].length);
        NEED(w->counts[i] && w->images[i]);
    }
}

void walker_share(struct walker *preempt, const struct walker *w, int fd)
{
    *preempt = *w;
    preempt->fd = fd;
    preempt->sections = false;
}

void walker_close(struct walker *w)
{
    for (uint32_t i = 0; i < w->ram->count; i++) {
        free(w->counts[i]);
        free(w->images[i]);
    }
}

static uint64_t be(const uint8_t *bytes, unsigned size)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < size; i++) {
        value = value << 8 | bytes[i];
    }
    return value;
}

static bool name_is(const struct ram_block *b, const uint8_t *name, size_t n)
{
    return strlen(b->idstr) == n && memcmp(b->idstr, name, n) == 0;
}

static const char *walk_name(struct walker *w)
{
    uint8_t length;
    uint8_t name[256];

    if (!receive(w->fd, &length, 1) || !receive(w->fd, name, length)) {
        return "cut in a name";
    }
    for (uint32_t i = 0; i < w->ram->count; i++) {
        if (name_is(&w->ram->blocks[i], name, length)) {
            w->last = (uint8_t)(i + 1);
            return NULL;
        }
    }
    return "unknown block";
}

/* A huge page's records are consecutive, from its first page on. */
static const char *walk_host(struct walker *w, const struct ram_block *b,
                             uint64_t offset)
{
    bool first = offset % b->page_size == 0;

    if (w->hosts_under_way ? offset != w->next_offset : !first) {
        return "huge page out of order";
    }
    w->next_offset = offset + PAGE;
    w->hosts_under_way = w->next_offset % b->page_size != 0;
    return NULL;
}

static const char *walk_page(struct walker *w, uint64_t offset, bool zero)
{
    const struct ram_block *b;
    const char *wrong = NULL;
    uint8_t *to;

    if (!w->last) {
        return "no block named";
    }
    b = &w->ram->blocks[w->last - 1];
    if (offset >= b->length) {
        return "offset past the block";
    }
    if (w->whole_hosts) {
        wrong = walk_host(w, b, offset);
    }
    to = w->images[w->last - 1] + offset;
    if (zero) {
        memset(to, 0, PAGE);
    } else if (!receive(w->fd, to, PAGE)) {
        return "cut in a page";
    }
    __atomic_fetch_add(&w->counts[w->last - 1][offset / PAGE], 1,
                       __ATOMIC_RELAXED);
    __atomic_fetch_add(&w->records, 1, __ATOMIC_SEQ_CST);
    return wrong;
}

/* One record after its first eight bytes. */
static const char *walk_record(struct walker *w, uint64_t word)
{
    uint64_t flags = word & (PAGE - 1);
    bool zero = flags & 0x02;
    const char *wrong = NULL;
    uint8_t fill = 0;

    if ((flags & ~UINT64_C(0x20)) != 0x02 &&
        (flags & ~UINT64_C(0x20)) != 0x08) {
        return "unexpected flags";
    }
    if (!(flags & 0x20)) {
        wrong = walk_name(w);
    }
    if (!wrong && zero && (!receive(w->fd, &fill, 1) || fill)) {
        wrong = "zero page's byte";
    }
    return wrong ? wrong : walk_page(w, word & ~(PAGE - 1), zero);
}

/* Behind the type of a command; the peer of `asker` would answer by a PONG. */
static const char *walk_mark(struct walker *w)
{
    uint8_t bytes[8];

    if (!receive(w->fd, bytes, 8) || be(bytes, 4) != 0x00020004) {
        return "unexpected command";
    }
    __atomic_fetch_add(&w->marks, 1, __ATOMIC_SEQ_CST);
    return pace_take_answer_untrusted(w->asker, (uint32_t)be(bytes + 4, 4)) ?
               NULL :
               "a PING that is no mark";
}

static const char *walk_section(struct walker *w, uint8_t type)
{
    uint8_t bytes[8];
    const char *wrong = NULL;

    if (type == 0x08 && w->asker && !w->ends) {
        return walk_mark(w);
    }
    if ((type != 0x02 && type != 0x03) || w->ends) {
        return "unexpected section";
    }
    w->ends += type == 0x03;
    if (!receive(w->fd, bytes, 4) || be(bytes, 4) != w->section_id) {
        return "section id";
    }
    for (;;) {
        if (!receive(w->fd, bytes, 8)) {
            return "cut in a section";
        }
        if (be(bytes, 8) == 0x10) {
            break;
        }
        wrong = walk_record(w, be(bytes, 8));
        if (wrong) {
            return wrong;
        }
    }
    if (w->hosts_under_way) {
        return "huge page split by the end of a section";
    }
    if (!receive(w->fd, bytes, 5) || bytes[0] != 0x7e ||
        be(bytes + 1, 4) != w->section_id) {
        return "footer";
    }
    return NULL;
}

struct result walker_run(void *walker)
{
    struct walker *w = walker;
    const char *wrong = NULL;
    uint8_t bytes[8];

    while (!wrong && receive(w->fd, bytes, w->sections ? 1 : 8)) {
        wrong = w->sections ? walk_section(w, bytes[0]) :
                              walk_record(w, be(bytes, 8));
    }
    if (!wrong && w->hosts_under_way) {
        wrong = "huge page without its end";
    }
    if (wrong) {
        fprintf(stderr, "stream: %s\n", wrong);
    }
    return wrong ? result_stream(wrong, 0, 0) : result_ok();
}

/* --- the stream, written ------------------------------------------------- */

void script_free(struct script *s)
{
    free(s->bytes);
    *s = (struct script){ 0 };
}

void put_bytes(struct script *s, const void *data, size_t size)
{
    if (s->size + size > s->room) {
        s->room = 2 * (s->size + size);
        s->bytes = realloc(s->bytes, s->room);
        NEED(s->bytes);
    }
    if (size) {
        memcpy(s->bytes + s->size, data, size);
    }
    s->size += size;
}

static void put_be(struct script *s, uint64_t value, unsigned size)
{
    while (size--) {
        put_byte(s, (uint8_t)(value >> (8 * size)));
    }
}

void put_byte(struct script *s, uint8_t value)
{
    put_bytes(s, &value, 1);
}

void put_be16(struct script *s, uint16_t value)
{
    put_be(s, value, 2);
}

void put_be32(struct script *s, uint32_t value)
{
    put_be(s, value, 4);
}

void put_be64(struct script *s, uint64_t value)
{
    put_be(s, value, 8);
}

void put_name(struct script *s, const char *idstr)
{
    put_byte(s, (uint8_t)strlen(idstr));
    put_bytes(s, idstr, strlen(idstr));
}

static void put_head(struct script *s, const char *idstr, uint64_t word)
{
    put_be64(s, word | (idstr ? 0 : 0x20));
    if (idstr) {
        put_name(s, idstr);
    }
}

void put_page(struct script *s, const char *idstr, uint64_t offset,
              uint64_t seed)
{
    uint8_t page[PAGE];

    put_head(s, idstr, offset | 0x08);
    pattern_fill(page, seed);
    put_bytes(s, page, sizeof(page));
}

void put_zero(struct script *s, const char *idstr, uint64_t offset)
{
    put_head(s, idstr, offset | 0x02);
    put_byte(s, 0);
}

void put_section(struct script *s, uint8_t type, uint32_t id)
{
    put_byte(s, type);
    put_be32(s, id);
}

void put_end_of_section(struct script *s, uint32_t id)
{
    put_be64(s, 0x10);
    put_byte(s, 0x7e);
    put_be32(s, id);
}
