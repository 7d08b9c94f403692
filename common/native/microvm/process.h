/*
 * The guest without KVM: each vCPU is a thread of this process that runs the
 * test guest's workload (guest/workload.c) on the same RAM.
 */
#ifndef MICROVM_PROCESS_H
#define MICROVM_PROCESS_H

#include "engine.h"
#include "guest/workload.h"
#include "ram.h"
#include "serial.h"

struct worker {
    struct gate_thread thread; /* first: a gate_thread that is a worker */
    struct workload workload;
};

struct process {
    struct engine engine; /* first: an engine that is a process */
    const struct ram *ram;
    uint64_t tsc_khz;
    struct worker workers[STATE_VCPUS_MAX];
};

/* One process has one of them. */
bool process_create(struct process *process, const struct ram *ram,
                    unsigned vcpus, struct serial *serial, struct fail *why);

/* What booting is under KVM; `command_line` as in guest/settings.h. */
bool process_boot(struct process *process, const char *command_line,
                  struct fail *why);

#endif
