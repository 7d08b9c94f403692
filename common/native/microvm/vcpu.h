/*
 * One vCPU: its thread, what it does when it leaves the guest, its state.
 *
 * The thread owns `fd` and `run` while the gate is open, the controlling
 * thread while it is closed.
 */
#ifndef MICROVM_VCPU_H
#define MICROVM_VCPU_H

#include "gate.h"
#include "serial.h"
#include "state.h"

#include <linux/kvm.h>

struct vcpu {
    struct gate_thread thread; /* first: a gate_thread that is a vcpu */
    int kvm;
    int vm;
    int fd;
    unsigned index;
    struct kvm_run *run;
    struct serial *serial;
};

bool vcpu_create(struct vcpu *vcpu, int kvm, int vm, unsigned index,
                 struct serial *serial, struct fail *why);

/* Registers for the 32-bit PVH entry. */
bool vcpu_start_at(struct vcpu *vcpu, uint32_t entry, uint32_t start_info,
                   struct fail *why);

bool vcpu_save(struct vcpu *vcpu, struct state_writer *w, struct fail *why);
bool vcpu_load(struct vcpu *vcpu, const struct state *state, struct fail *why);

#endif
