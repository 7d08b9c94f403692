/*
 * The controlling thread: keeps the guest attached to whatever daemon listens
 * at a path, and does what it asks.
 */
#ifndef MICROVM_CONTROL_H
#define MICROVM_CONTROL_H

#include "attach.h"
#include "engine.h"
#include "ram.h"

enum guest_state {
    GUEST_INCOMING,
    GUEST_PAUSED,
    GUEST_RUNNING,
};

/* A descriptor the daemon wants back when it attaches again. */
struct kept {
    char name[ATTACH_NAME_MAX + 1];
    int fd;
};

#define KEPT_MAX (ATTACH_DESCRIPTORS_MAX - 3) /* userfaultfd, pagemap, RAM */

struct control {
    const char *path;
    const char *machine;
    const struct ram *ram;
    struct engine *engine;
    enum guest_state state; /* GUEST_RUNNING starts once it is attached */
    int link;
    bool attached;
    bool ever_attached;
    bool told_end; /* the daemon knows that the guest has ended */
    bool quit;
    size_t kept_count;
    struct kept kept[KEPT_MAX];
    char last_complaint[512];
};

/* Returns after `quit`, or false if the guest can't be attached. */
bool control_run(struct control *control, struct fail *why);

#endif
