/* The guest as a KVM virtual machine: memory, vCPUs, local APICs, one port. */
#ifndef MICROVM_VM_H
#define MICROVM_VM_H

#include "engine.h"
#include "ram.h"
#include "vcpu.h"

struct vm {
    struct engine engine; /* first: an engine that is a vm */
    int kvm;
    int fd;
    struct vcpu vcpus[STATE_VCPUS_MAX];
};

/* False with a reason if KVM can't be used here at all. */
bool vm_is_possible(struct fail *why);

/* vCPUs as after a reset, gate closed, RAM untouched. */
bool vm_create(struct vm *vm, const struct ram *ram, unsigned vcpus,
               struct serial *serial, struct fail *why);

/* Speed of the guest's time stamp counter. */
uint64_t vm_tsc_khz(const struct vm *vm);

#endif
