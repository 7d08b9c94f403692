#include "control.h"
#include "link.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* A daemon that is being started listens within this time. */
#define FIRST_ATTACH_MS 10000
#define RETRY_FIRST_MS 10
#define RETRY_MAX_MS 250

static const char *const state_words[] = {
    [GUEST_INCOMING] = "incoming",
    [GUEST_PAUSED] = "paused",
    [GUEST_RUNNING] = "running",
};

/* Say something about the connection; not again and again the same. */
static void complain(struct control *c, const char *text)
{
    if (strcmp(c->last_complaint, text) == 0)
        return;
    snprintf(c->last_complaint, sizeof(c->last_complaint), "%s", text);
    fprintf(stderr, "microvm: %s\n", text);
}

static void detach(struct control *c)
{
    close(c->link);
    c->link = -1;
    c->attached = false;
    c->told_end = false;
}

/* Send a message that one of the attach_*_text() made. */
static void send_text(struct control *c, char *text, const int *descriptors,
                      size_t count)
{
    if (!text)
        complain(c, "no memory for a message");
    if (!text || !link_send(c->link, text, descriptors, count))
        detach(c);
    free(text);
}

/* Kept descriptors */

static struct kept *find_kept(struct control *c, const char *name)
{
    for (size_t i = 0; i < c->kept_count; i++) {
        if (strcmp(c->kept[i].name, name) == 0)
            return &c->kept[i];
    }
    return NULL;
}

static bool keep(struct control *c, const char *name, int fd, struct fail *why)
{
    struct kept *kept = find_kept(c, name);

    if (kept) {
        close(kept->fd);
    } else if (c->kept_count == KEPT_MAX) {
        return fail(why, "no more than %u descriptors can be kept", KEPT_MAX);
    } else {
        kept = &c->kept[c->kept_count++];
        snprintf(kept->name, sizeof(kept->name), "%s", name);
    }
    kept->fd = fd;
    return true;
}

static bool forget(struct control *c, const char *name, struct fail *why)
{
    struct kept *kept = find_kept(c, name);

    if (!kept)
        return fail(why, "nothing is kept under the name '%s'", name);
    close(kept->fd);
    *kept = c->kept[--c->kept_count];
    return true;
}

/* Attaching */

struct offer {
    int descriptors[ATTACH_DESCRIPTORS_MAX];
    const char *names[ATTACH_DESCRIPTORS_MAX];
    char kept_names[KEPT_MAX][sizeof("keep:") + ATTACH_NAME_MAX];
    size_t count;
};

static void offer(struct offer *o, const char *name, int fd)
{
    o->names[o->count] = name;
    o->descriptors[o->count++] = fd;
}

static void offer_all(const struct control *c, struct offer *o)
{
    if (c->ram->userfaultfd >= 0)
        offer(o, "userfaultfd", c->ram->userfaultfd);
    offer(o, "pagemap", c->ram->pagemap);
    offer(o, "block:" RAM_IDSTR, c->ram->memfd);
    for (size_t i = 0; i < c->kept_count; i++) {
        snprintf(o->kept_names[i], sizeof(o->kept_names[i]), "keep:%s",
                 c->kept[i].name);
        offer(o, o->kept_names[i], c->kept[i].fd);
    }
}

static void send_attach(struct control *c)
{
    const struct gate *gate = &c->engine->gate;
    struct offer *o = calloc(1, sizeof(*o));
    pid_t threads[GATE_THREADS_MAX];

    if (!o) {
        send_text(c, NULL, NULL, 0);
        return;
    }
    offer_all(c, o);
    for (unsigned i = 0; i < gate->count; i++)
        threads[i] = gate->threads[i]->id;
    send_text(
        c,
        attach_hello_text(&(struct attach_hello){
            .machine = c->machine,
            .device = c->engine->device,
            .device_version = STATE_VERSION,
            .state = state_words[c->state],
            .pid = getpid(),
            .vcpus = threads,
            .vcpu_count = gate->count,
            .idstr = RAM_IDSTR,
            .length = c->ram->length,
            .page_size = c->ram->page_size,
            .base = (uintptr_t)c->ram->base,
            .guest_address = 0,
            .descriptors = o->names,
            .descriptor_count = o->count,
            .no_userfaultfd =
                c->ram->userfaultfd < 0 ? c->ram->no_userfaultfd.text : NULL,
        }),
        o->descriptors, o->count);
    free(o);
}

static void on_attached(struct control *c)
{
    c->attached = true;
    c->ever_attached = true;
    c->last_complaint[0] = '\0';
    if (c->state == GUEST_RUNNING)
        gate_open(&c->engine->gate);
}

/* Device state */

static bool write_fully(int fd, const uint8_t *bytes, size_t length)
{
    size_t done = 0;

    while (done < length) {
        ssize_t put = write(fd, bytes + done, length - done);

        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return false;
        done += (size_t)put;
    }
    return true;
}

/* The descriptor of a memfd with these bytes, or -1. */
static int make_memfd(const uint8_t *bytes, size_t length, struct fail *why)
{
    int fd = memfd_create("device-state", MFD_CLOEXEC);

    if (fd >= 0 && write_fully(fd, bytes, length))
        return fd;
    fail(why, "no memory for the device state: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    return -1;
}

static bool save(struct control *c, int64_t id, struct fail *why)
{
    struct state_writer writer = { 0 };
    int fd = -1;

    if (c->state != GUEST_PAUSED)
        return fail(why, "the guest is %s, not paused", state_words[c->state]);
    if (c->engine->save(c->engine, &writer, why))
        fd = make_memfd(writer.bytes, writer.length, why);
    free(writer.bytes);
    if (fd < 0)
        return false;
    send_text(c, attach_saved_text(id, writer.length), &fd, 1);
    close(fd);
    return true;
}

/* To be freed. pread: the sender's offset may be anywhere. */
static uint8_t *read_state(int fd, size_t length, struct fail *why)
{
    uint8_t *bytes = malloc(length);
    size_t done = 0;

    while (bytes && done < length) {
        ssize_t got = pread(fd, bytes + done, length - done, (off_t)done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            fail(why, "the descriptor of the device state has no %zu bytes",
                 length);
            free(bytes);
            return NULL;
        }
        done += (size_t)got;
    }
    if (!bytes)
        fail(why, "no memory for %zu bytes of device state", length);
    return bytes;
}

static bool check_load(const struct control *c, const struct attach_message *m,
                       struct fail *why)
{
    if (c->state != GUEST_INCOMING)
        return fail(why, "the guest is %s, not incoming",
                    state_words[c->state]);
    if (strcmp(m->name, c->engine->device) != 0)
        return fail(why,
                    "this guest loads device state of '%s', not of "
                    "'%s'",
                    c->engine->device, m->name);
    if (m->version > STATE_VERSION)
        return fail(why,
                    "device state version %u is newer than this "
                    "program's %u",
                    m->version, STATE_VERSION);
    if (m->length < 1 || m->length > STATE_MAX)
        return fail(why, "%llu bytes of device state, expected 1 to %u",
                    (unsigned long long)m->length, STATE_MAX);
    return true;
}

static bool load(struct control *c, const struct attach_message *m, int fd,
                 struct fail *why)
{
    struct state state;
    uint8_t *bytes;
    bool good;

    if (!check_load(c, m, why))
        return false;
    bytes = read_state(fd, m->length, why);
    if (!bytes)
        return false;
    good = state_parse(bytes, m->length, &state, why);
    if (good && state.vcpus != c->engine->vcpus)
        good = fail(why, "the device state is of %u vCPUs, this guest has %u",
                    state.vcpus, c->engine->vcpus);
    good = good && c->engine->load(c->engine, &state, why);
    free(bytes);
    if (good)
        c->state = GUEST_PAUSED;
    return good;
}

/* Requests */

static bool go_on(struct control *c, struct fail *why)
{
    if (c->state == GUEST_INCOMING)
        return fail(why, "the guest is incoming and waits for its state");
    c->state = GUEST_RUNNING;
    gate_open(&c->engine->gate);
    return true;
}

static bool stop(struct control *c, struct fail *why)
{
    if (!gate_close(&c->engine->gate, why))
        return false;
    if (c->state == GUEST_RUNNING)
        c->state = GUEST_PAUSED;
    return true;
}

/* The one descriptor that comes with the request; -1 if it is not one. */
static int take_descriptor(struct packet *p, struct fail *why)
{
    if (p->descriptor_count != 1) {
        fail(why, "expected one descriptor, got %zu", p->descriptor_count);
        return -1;
    }
    return p->descriptors[0];
}

static bool do_load(struct control *c, const struct attach_message *m,
                    struct packet *p, struct fail *why)
{
    int fd = take_descriptor(p, why);

    return fd >= 0 && load(c, m, fd, why);
}

static bool do_keep(struct control *c, const struct attach_message *m,
                    struct packet *p, struct fail *why)
{
    int fd = take_descriptor(p, why);

    if (fd < 0 || !keep(c, m->name, fd, why))
        return false;
    p->descriptor_count = 0; /* ours now */
    return true;
}

static bool do_request(struct control *c, const struct attach_message *m,
                       struct packet *p, struct fail *why)
{
    switch (m->request) {
    case ATTACH_STOP:
        return stop(c, why);
    case ATTACH_CONT:
        return go_on(c, why);
    case ATTACH_SAVE:
        return save(c, m->id, why);
    case ATTACH_LOAD:
        return do_load(c, m, p, why);
    case ATTACH_KEEP:
        return do_keep(c, m, p, why);
    case ATTACH_FORGET:
        return forget(c, m->name, why);
    case ATTACH_QUIT:
        c->quit = true;
        return true;
    default:
        return fail(why, "unknown request '%s'", m->text);
    }
}

static void on_request(struct control *c, const struct attach_message *m,
                       struct packet *p)
{
    struct fail why;

    if (!do_request(c, m, p, &why))
        send_text(c, attach_error_text(m->id, why.text), NULL, 0);
    else if (m->request != ATTACH_SAVE) /* which has answered by itself */
        send_text(c, attach_return_text(m->id), NULL, 0);
}

static void on_message(struct control *c, const struct attach_message *m,
                       struct packet *p)
{
    struct fail why;

    switch (m->kind) {
    case ATTACH_ATTACHED:
        on_attached(c);
        break;
    case ATTACH_REFUSED:
        fail(&why, "the daemon refuses the guest: %s", m->text);
        complain(c, why.text);
        detach(c);
        break;
    case ATTACH_REQUEST:
        on_request(c, m, p);
        break;
    }
}

static void on_packet(struct control *c, struct packet *p)
{
    struct attach_message m;
    struct fail why;

    if (attach_parse(p->bytes, p->length, &m, &why)) {
        on_message(c, &m, p);
    } else {
        complain(c, why.text);
        detach(c);
    }
    packet_close(p);
}

/* The connection */

static int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void sleep_ms(int ms)
{
    poll(NULL, 0, ms);
}

/*
 * Connect and introduce the guest. The first time for FIRST_ATTACH_MS, later
 * for as long as it takes: the guest runs on meanwhile.
 */
static bool connect_again(struct control *c, struct fail *why)
{
    int64_t deadline = now_ms() + FIRST_ATTACH_MS;
    int wait = RETRY_FIRST_MS;

    while ((c->link = link_connect(c->path)) < 0) {
        if (!c->ever_attached && now_ms() > deadline)
            return fail(why, "nobody listens at %s: %s", c->path,
                        strerror(errno));
        sleep_ms(wait);
        wait = wait < RETRY_MAX_MS / 2 ? 2 * wait : RETRY_MAX_MS;
    }
    send_attach(c);
    return true;
}

static bool has_ended(const struct control *c)
{
    struct pollfd event = { .fd = c->engine->gate.event, .events = POLLIN };

    return poll(&event, 1, 0) > 0;
}

static void tell_end(struct control *c)
{
    struct fail why;

    /*
     * The gate is closed for good already. This takes its lock, which makes
     * the reason ours to read, and lets the other vCPUs come to rest.
     */
    stop(c, &why);
    c->told_end = true;
    send_text(c, attach_shutdown_text(c->engine->gate.reason.text), NULL, 0);
}

/* Wait for the daemon, and until it was told for the end of the guest. */
static void wait_for_something(const struct control *c)
{
    struct pollfd events[] = {
        { .fd = c->link, .events = POLLIN },
        { .fd = c->engine->gate.event, .events = POLLIN },
    };

    poll(events, c->attached && !c->told_end ? 2 : 1, -1);
}

static bool has_packet(const struct control *c)
{
    struct pollfd event = { .fd = c->link, .events = POLLIN };

    return poll(&event, 1, 0) > 0;
}

static void serve_link(struct control *c, struct packet *packet)
{
    wait_for_something(c);
    if (c->attached && !c->told_end && has_ended(c))
        tell_end(c);
    if (c->link < 0 || !has_packet(c))
        return;
    if (link_receive(c->link, packet))
        on_packet(c, packet);
    else
        detach(c);
}

bool control_run(struct control *c, struct fail *why)
{
    struct packet *packet = calloc(1, sizeof(*packet));

    c->link = -1;
    while (packet && !c->quit) {
        if (c->link < 0 && !connect_again(c, why))
            break;
        while (c->link >= 0 && !c->quit)
            serve_link(c, packet);
        if (c->quit)
            break;
        if (!c->ever_attached) {
            fail(why, "the guest was not attached");
            break;
        }
        /* Nothing is left of an ended guest that a daemon could move. */
        if (has_ended(c)) {
            fail(why, "the guest has ended: %s", c->engine->gate.reason.text);
            break;
        }
        sleep_ms(RETRY_FIRST_MS);
    }
    free(packet);
    return c->quit;
}
