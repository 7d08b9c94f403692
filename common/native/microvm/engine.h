/*
 * What runs the guest: KVM (vm.c), or threads of this process (process.c).
 * The controlling thread alone calls these.
 */
#ifndef MICROVM_ENGINE_H
#define MICROVM_ENGINE_H

#include "gate.h"
#include "state.h"

struct engine {
    const char *device; /* name of its device state in the attach message */
    struct gate gate;   /* its threads are the vCPUs, in order */
    unsigned vcpus;

    /* The guest is stopped, and stays so. */
    bool (*save)(struct engine *engine, struct state_writer *w,
                 struct fail *why);
    bool (*load)(struct engine *engine, const struct state *state,
                 struct fail *why);
};

#endif
