/*
 * Device state: one run of bytes that holds all of the guest but its RAM. The
 * format is described in state.c. Neither reading nor writing knows what is in
 * a record; vcpu.c and process.c do.
 */
#ifndef MICROVM_STATE_H
#define MICROVM_STATE_H

#include "fail.h"

#include <stddef.h>
#include <stdint.h>

#define STATE_VERSION 1u
#define STATE_MAX (8u << 20) /* bytes of device state */
#define STATE_RECORD_MAX (512u << 10)
#define STATE_RECORDS_MAX 256u
#define STATE_VCPUS_MAX 8u
#define STATE_WHOLE_VM 0xffffffffu /* instead of a vCPU's number */

enum state_accel {
    STATE_KVM = 1,
    STATE_PROCESS = 2,
};

/* Contents as the kernel's header has it (x86), unless said otherwise. */
enum state_type {
    STATE_MP_STATE = 1,  /* struct kvm_mp_state */
    STATE_SREGS = 2,     /* struct kvm_sregs */
    STATE_SREGS2 = 3,    /* struct kvm_sregs2 */
    STATE_REGS = 4,      /* struct kvm_regs */
    STATE_XCRS = 5,      /* struct kvm_xcrs */
    STATE_XSAVE = 6,     /* struct kvm_xsave, as long as KVM says */
    STATE_DEBUGREGS = 7, /* struct kvm_debugregs */
    STATE_LAPIC = 8,     /* struct kvm_lapic_state */
    STATE_MSRS = 9,      /* struct kvm_msr_entry, in the order to set them */
    STATE_EVENTS = 10,   /* struct kvm_vcpu_events */
    STATE_CLOCK = 11,    /* struct kvm_clock_data; of the whole VM */
    STATE_WORKER = 12,   /* see process.c */
};

struct state_record {
    uint32_t type;
    uint32_t vcpu;
    uint32_t length;
    const uint8_t *bytes; /* in the memory that was parsed */
};

struct state {
    uint32_t accel;
    uint32_t vcpus;
    uint32_t count;
    struct state_record records[STATE_RECORDS_MAX];
};

/* Reads no byte outside of the given ones, whatever they are. */
bool state_parse(const void *bytes, size_t length, struct state *state,
                 struct fail *why);

/* NULL if there is no such record. */
const struct state_record *state_find(const struct state *state, uint32_t vcpu,
                                      uint32_t type);

/* Grows as it is written to. `bytes` is NULL once memory has run out. */
struct state_writer {
    uint8_t *bytes;
    size_t length;
    size_t capacity;
    uint32_t records;
};

void state_begin(struct state_writer *w, uint32_t accel, uint32_t vcpus);
void state_put(struct state_writer *w, uint32_t type, uint32_t vcpu,
               const void *bytes, size_t length);
/* False if memory ran out somewhere. `bytes` is to be freed in either case. */
bool state_end(struct state_writer *w, struct fail *why);

#endif
