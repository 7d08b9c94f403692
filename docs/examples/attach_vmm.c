/*
 * A complete VMM for the attach protocol, as small as it can be.
 *
 *     cc -o attach_vmm attach_vmm.c -ljansson -lpthread
 *     attach_vmm SOCKET SIZE running|incoming
 *
 * Its "CPU" is a thread with two registers, `counter` and `wrong`. Step n
 * writes the number n all over page 1 + n % (pages - 1), after checking that
 * the page still holds what it was given a round before. Page 0 shows the
 * registers to whoever looks at the RAM. Before it ends the program prints
 * them.
 *
 * attach_vmm.py does the same; a guest can move from one to the other.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <err.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define DEVICE "example"
#define MESSAGE_MAX 65536u
#define DESCRIPTORS_MAX 128u
#define NAME_MAX_BYTES 256u
#define NEW_USERFAULTFD _IO(0xAA, 0x00)

/* The guest */

static volatile uint64_t *ram;
static uint64_t ram_length;

static struct {
    pthread_mutex_t lock; /* protects what follows */
    pthread_cond_t changed;
    bool running;
    uint64_t counter, wrong;
    pid_t thread;
} cpu = { .lock = PTHREAD_MUTEX_INITIALIZER,
          .changed = PTHREAD_COND_INITIALIZER };

/* From the return of this call on the guest runs, or touches nothing. */
static void set_running(bool running)
{
    pthread_mutex_lock(&cpu.lock);
    cpu.running = running;
    pthread_cond_broadcast(&cpu.changed);
    pthread_mutex_unlock(&cpu.lock);
}

static void step_locked(volatile uint64_t *page, uint64_t pages)
{
    uint64_t expected = cpu.counter < pages ? 0 : cpu.counter - pages + 1;
    bool good = true;

    cpu.counter++;
    for (unsigned i = 0; i < WORDS; i++) {
        good = good && page[i] == expected;
        page[i] = cpu.counter;
    }
    cpu.wrong += !good;
    ram[0] = cpu.counter;
    ram[1] = cpu.wrong;
}

static void *run_cpu(void *unused)
{
    uint64_t pages = ram_length / PAGE - 1; /* without page 0 */

    pthread_mutex_lock(&cpu.lock);
    cpu.thread = (pid_t)syscall(SYS_gettid);
    pthread_cond_broadcast(&cpu.changed);
    for (;;) {
        volatile uint64_t *page;

        while (!cpu.running)
            pthread_cond_wait(&cpu.changed, &cpu.lock);
        page = ram + (1 + cpu.counter % pages) * WORDS;
        pthread_mutex_unlock(&cpu.lock);
        /*
         * Waiting for a page happens here, without the lock, so the guest can
         * be stopped meanwhile. After that both pages are present.
         */
        (void)ram[0];
        (void)page[0];
        pthread_mutex_lock(&cpu.lock);
        if (cpu.running)
            step_locked(page, pages);
        pthread_mutex_unlock(&cpu.lock);
        usleep(100);
        pthread_mutex_lock(&cpu.lock);
    }
    return unused;
}

static void start_cpu(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, run_cpu, NULL))
        errx(1, "cannot start a thread");
    pthread_mutex_lock(&cpu.lock);
    while (!cpu.thread)
        pthread_cond_wait(&cpu.changed, &cpu.lock);
    pthread_mutex_unlock(&cpu.lock);
}

/* What the daemon gets: descriptors with names */

static struct {
    char name[NAME_MAX_BYTES];
    int fd;
} given[DESCRIPTORS_MAX];
static size_t given_count;

static void forget(const char *name)
{
    for (size_t i = 0; i < given_count; i++) {
        if (strcmp(given[i].name, name) == 0) {
            close(given[i].fd);
            given[i] = given[--given_count];
        }
    }
}

static void give(const char *prefix, const char *name, int fd)
{
    char full[NAME_MAX_BYTES];

    if (fd < 0)
        err(1, "%s%s", prefix, name);
    snprintf(full, sizeof(full), "%s%s", prefix, name);
    forget(full);
    if (given_count == DESCRIPTORS_MAX)
        errx(1, "too many descriptors to keep");
    strcpy(given[given_count].name, full);
    given[given_count++].fd = fd;
}

/* A raw userfaultfd: the daemon does everything else with it. */
static int open_userfaultfd(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

    if (device >= 0)
        return ioctl(device, NEW_USERFAULTFD, O_CLOEXEC | O_NONBLOCK);
    return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

static void make_ram(void)
{
    int memfd = memfd_create("ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (memfd < 0 || ftruncate(memfd, (off_t)ram_length) < 0 ||
        fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
        err(1, "memfd");
    ram = mmap(NULL, ram_length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (ram == MAP_FAILED)
        err(1, "mmap");
    madvise((void *)(uintptr_t)ram, ram_length, MADV_DONTFORK);
    madvise((void *)(uintptr_t)ram, ram_length, MADV_DONTDUMP);
    give("", "userfaultfd", open_userfaultfd());
    /* Opened here, so that the daemon needs no right over this process. */
    give("", "pagemap", open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    give("block:", "ram", memfd);
}

/* The socket */

static char packet[MESSAGE_MAX];

union control {
    char bytes[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    struct cmsghdr align;
};

/* Takes `message` over. False if the daemon has gone away. */
static bool send_message(int sock, json_t *message, const int *fds,
                         size_t count)
{
    char *text = json_dumps(message, JSON_COMPACT);
    struct iovec part = { text, strlen(text) };
    union control control = { 0 };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };
    struct cmsghdr *c = &control.align;
    bool sent;

    if (count > 0) {
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(count * sizeof(int));
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(c), fds, count * sizeof(int));
    }
    sent = sendmsg(sock, &header, MSG_NOSIGNAL) >= 0;
    free(text);
    json_decref(message);
    return sent;
}

/* One message and the descriptor with it, or -1; NULL at the end. */
static json_t *receive_message(int sock, int *fd)
{
    union control control;
    struct iovec part = { packet, sizeof(packet) };
    struct msghdr header = { .msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes) };
    ssize_t length = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c;

    *fd = -1;
    if (length <= 0)
        return NULL;
    c = CMSG_FIRSTHDR(&header);
    if (c && c->cmsg_type == SCM_RIGHTS) /* requests carry one at most */
        memcpy(fd, CMSG_DATA(c), sizeof(*fd));
    return json_loadb(packet, (size_t)length, JSON_REJECT_DUPLICATES, NULL);
}

/* Requests. Each returns NULL, or a sentence that says what is wrong */

enum { INCOMING, PAUSED, RUNNING };
static const char *const states[] = { "incoming", "paused", "running" };
static int state;
static bool ended;

/* The device state: two integers of 64 bits, big-endian. */
static int save(void)
{
    uint64_t registers[2] = { htobe64(cpu.counter), htobe64(cpu.wrong) };
    int fd = memfd_create("device-state", MFD_CLOEXEC);

    if (fd < 0 || write(fd, registers, sizeof(registers)) < 0)
        err(1, "save");
    return fd;
}

static const char *load(const json_t *arguments, int fd)
{
    const char *name = json_string_value(json_object_get(arguments, "name"));
    uint64_t registers[2];

    if (!name || strcmp(name, DEVICE) != 0 ||
        json_integer_value(json_object_get(arguments, "version")) != 1 ||
        json_integer_value(json_object_get(arguments, "length")) != 16 ||
        pread(fd, registers, sizeof(registers), 0) != sizeof(registers))
        return "this is no device state of '" DEVICE "'";
    cpu.counter = be64toh(registers[0]);
    cpu.wrong = be64toh(registers[1]);
    state = PAUSED;
    return NULL;
}

static const char *keep(const char *name, int fd)
{
    int copy;

    if (!name || strlen(name) > 200 || fd < 0)
        return "keep needs a name and a descriptor";
    copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    give("keep:", name, copy);
    return NULL;
}

static const char *do_request(const char *what, const json_t *arguments, int fd)
{
    const char *name = json_string_value(json_object_get(arguments, "name"));
    char full[NAME_MAX_BYTES];

    if (strcmp(what, "stop") == 0) {
        set_running(false);
        state = state == RUNNING ? PAUSED : state;
    } else if (strcmp(what, "cont") == 0 && state != INCOMING) {
        set_running(true);
        state = RUNNING;
    } else if (strcmp(what, "load") == 0 && state == INCOMING) {
        return load(arguments, fd);
    } else if (strcmp(what, "keep") == 0) {
        return keep(name, fd);
    } else if (strcmp(what, "forget") == 0 && name) {
        snprintf(full, sizeof(full), "keep:%s", name);
        forget(full);
    } else if (strcmp(what, "quit") == 0) {
        ended = true;
    } else {
        return "no such request in this state of the guest";
    }
    return NULL;
}

/* Answer one request; false if the daemon has gone away. */
static bool answer(int sock)
{
    int in, out = -1;
    json_t *request = receive_message(sock, &in);
    const char *what = json_string_value(json_object_get(request, "request"));
    json_t *id = json_object_get(request, "id");
    const char *wrong = NULL;
    bool sent;

    if (!what || !id) {
        json_decref(request);
        return false;
    }
    if (strcmp(what, "save") == 0 && state == PAUSED)
        out = save();
    else
        wrong = do_request(what, json_object_get(request, "arguments"), in);
    if (out >= 0)
        sent =
            send_message(sock,
                         json_pack("{s:{s:i}, s:O, s:[s]}", "return", "length",
                                   16, "id", id, "descriptors", "state"),
                         &out, 1);
    else if (wrong)
        sent = send_message(
            sock, json_pack("{s:s, s:O}", "error", wrong, "id", id), NULL, 0);
    else
        sent = send_message(sock, json_pack("{s:{}, s:O}", "return", "id", id),
                            NULL, 0);
    json_decref(request);
    close(in);
    close(out);
    return sent;
}

/* Attaching */

static bool attach(int sock)
{
    json_t *names = json_array(), *reply;
    int fds[DESCRIPTORS_MAX], none;

    for (size_t i = 0; i < given_count; i++) {
        json_array_append_new(names, json_string(given[i].name));
        fds[i] = given[i].fd;
    }
    if (!send_message(sock,
                      json_pack("{s:{s:i, s:s, s:{s:s, s:i}, s:s, s:i, s:[i],"
                                " s:[{s:s, s:I, s:i, s:I, s:i}], s:o}}",
                                "attach", "version", 1, "machine",
                                "postcopyd-1", "device", "name", DEVICE,
                                "version", 1, "state", states[state], "pid",
                                (int)getpid(), "vcpus", (int)cpu.thread,
                                "blocks", "idstr", "ram", "length",
                                (json_int_t)ram_length, "page-size", (int)PAGE,
                                "base", (json_int_t)(uintptr_t)ram,
                                "guest-address", 0, "descriptors", names),
                      fds, given_count))
        return false;
    reply = receive_message(sock, &none);
    if (json_object_get(reply, "refused"))
        errx(1, "the daemon refuses the guest: %s",
             json_string_value(
                 json_object_get(json_object_get(reply, "refused"), "reason")));
    if (state == RUNNING)
        set_running(true);
    json_decref(reply);
    return reply != NULL;
}

/*
 * Until `quit`: if a daemon goes away the guest runs on and waits for the next
 * one at the same path.
 */
static void serve(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
    while (!ended) {
        int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

        if (connect(sock, (struct sockaddr *)&address, sizeof(address)) == 0 &&
            attach(sock)) {
            while (!ended && answer(sock))
                ;
        }
        close(sock);
        if (!ended)
            usleep(100000);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4 ||
        (strcmp(argv[3], "running") != 0 && strcmp(argv[3], "incoming") != 0))
        errx(2, "usage: attach_vmm SOCKET SIZE running|incoming");
    ram_length = strtoull(argv[2], NULL, 10);
    if (ram_length < 2 * PAGE || ram_length % PAGE)
        errx(2, "SIZE is a multiple of %u, and two pages at least", PAGE);
    state = argv[3][0] == 'r' ? RUNNING : INCOMING;
    make_ram();
    start_cpu();
    serve(argv[1]);
    set_running(false);
    printf("counter %llu wrong %llu\n", (unsigned long long)cpu.counter,
           (unsigned long long)cpu.wrong);
    return 0;
}
