/*
 * The state of one vCPU: from KVM into records of device state and back.
 */
#include "vcpu.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

/* The parts that are one struct each, in the order to set them */

struct part {
    enum state_type type;
    const char *name;
    unsigned long get;
    unsigned long set;
    size_t size;     /* 0: ask KVM (XSAVE) */
    long capability; /* 0: every KVM has it */
};

/*
 * MP_STATE first: reading it works off a pending INIT or SIPI, which changes
 * the rest. XCRS before XSAVE, which they enable. LAPIC before the MSRs, one
 * of which is its deadline. EVENTS last: setting others may clear them.
 */
static const struct part before_msrs[] = {
    { STATE_MP_STATE, "MP_STATE", KVM_GET_MP_STATE, KVM_SET_MP_STATE,
      sizeof(struct kvm_mp_state), 0 },
    { STATE_SREGS2, "SREGS2", KVM_GET_SREGS2, KVM_SET_SREGS2,
      sizeof(struct kvm_sregs2), KVM_CAP_SREGS2 },
    { STATE_SREGS, "SREGS", KVM_GET_SREGS, KVM_SET_SREGS,
      sizeof(struct kvm_sregs), 0 },
    { STATE_REGS, "REGS", KVM_GET_REGS, KVM_SET_REGS, sizeof(struct kvm_regs),
      0 },
    { STATE_XCRS, "XCRS", KVM_GET_XCRS, KVM_SET_XCRS, sizeof(struct kvm_xcrs),
      KVM_CAP_XCRS },
    { STATE_XSAVE, "XSAVE", KVM_GET_XSAVE, KVM_SET_XSAVE, 0, KVM_CAP_XSAVE },
    { STATE_DEBUGREGS, "DEBUGREGS", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS,
      sizeof(struct kvm_debugregs), KVM_CAP_DEBUGREGS },
    { STATE_LAPIC, "LAPIC", KVM_GET_LAPIC, KVM_SET_LAPIC,
      sizeof(struct kvm_lapic_state), 0 },
};

static const struct part after_msrs[] = {
    { STATE_EVENTS, "VCPU_EVENTS", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS,
      sizeof(struct kvm_vcpu_events), KVM_CAP_VCPU_EVENTS },
};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static bool has(const struct vcpu *vcpu, long capability)
{
    return capability == 0 ||
           ioctl(vcpu->vm, KVM_CHECK_EXTENSION, capability) > 0;
}

static size_t part_size(const struct vcpu *vcpu, const struct part *part)
{
    int size;

    if (part->size)
        return part->size;
    size = ioctl(vcpu->vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    return size > (int)sizeof(struct kvm_xsave) ? (size_t)size :
                                                  sizeof(struct kvm_xsave);
}

static unsigned long part_get(const struct part *part, size_t size)
{
    if (part->type == STATE_XSAVE && size > sizeof(struct kvm_xsave))
        return KVM_GET_XSAVE2;
    return part->get;
}

static bool save_part(struct vcpu *vcpu, const struct part *part,
                      struct state_writer *w, struct fail *why)
{
    size_t size = part_size(vcpu, part);
    void *bytes;
    bool good;

    if (!has(vcpu, part->capability))
        return true;
    bytes = calloc(1, size);
    good = bytes && ioctl(vcpu->fd, part_get(part, size), bytes) == 0;
    if (good)
        state_put(w, part->type, vcpu->index, bytes, size);
    else
        fail(why, "cannot read %s of vCPU %u: %s", part->name, vcpu->index,
             strerror(errno));
    free(bytes);
    return good;
}

/* Records shorter than ours come from a host with less to save. */
static bool load_part(struct vcpu *vcpu, const struct part *part,
                      const struct state *state, struct fail *why)
{
    const struct state_record *r = state_find(state, vcpu->index, part->type);
    size_t size = part_size(vcpu, part);
    bool exact = part->size != 0;
    void *bytes;
    bool good;

    if (!r)
        return true;
    if (exact ? r->length != size : r->length > size)
        return fail(why, "%s of vCPU %u has %u bytes, this host has %zu",
                    part->name, vcpu->index, r->length, size);
    bytes = calloc(1, size);
    if (!bytes)
        return fail(why, "no memory for %s", part->name);
    memcpy(bytes, r->bytes, r->length);
    good = ioctl(vcpu->fd, part->set, bytes) == 0;
    if (!good)
        fail(why, "this host cannot take %s of vCPU %u: %s", part->name,
             vcpu->index, strerror(errno));
    free(bytes);
    return good;
}

/* The MSRs */

#define MSRS_MAX 1024u
#define MSR_TSC 0x10u
#define MSR_TSC_ADJUST 0x3bu
#define MSR_TSC_DEADLINE 0x6e0u

/*
 * The deadline means something only once the TSC is right, and the TSC moves
 * its adjustment along unless that is set first. The rest is in between.
 */
static unsigned msr_rank(uint32_t index)
{
    switch (index) {
    case MSR_TSC_ADJUST:
        return 0;
    case MSR_TSC:
        return 1;
    case MSR_TSC_DEADLINE:
        return 3;
    default:
        return 2;
    }
}

/* One MSR, read or set. */
static bool msr_call(struct vcpu *vcpu, unsigned long call,
                     struct kvm_msr_entry *entry)
{
    union {
        struct kvm_msrs list;
        uint8_t bytes[sizeof(struct kvm_msrs) + sizeof(struct kvm_msr_entry)];
    } one = { .list.nmsrs = 1 };
    bool good;

    memcpy(one.bytes + sizeof(one.list), entry, sizeof(*entry));
    good = ioctl(vcpu->fd, call, &one) == 1;
    memcpy(entry, one.bytes + sizeof(one.list), sizeof(*entry));
    return good;
}

/* Reads the MSR that `entry` names. */
static bool get_msr(struct vcpu *vcpu, struct kvm_msr_entry *entry)
{
    return msr_call(vcpu, KVM_GET_MSRS, entry);
}

static bool set_msr(struct vcpu *vcpu, struct kvm_msr_entry entry)
{
    return msr_call(vcpu, KVM_SET_MSRS, &entry);
}

static bool list_msrs(struct vcpu *vcpu, struct kvm_msr_list *list,
                      struct fail *why)
{
    list->nmsrs = MSRS_MAX;
    if (ioctl(vcpu->kvm, KVM_GET_MSR_INDEX_LIST, list) < 0)
        return fail(why, "cannot list the MSRs: %s", strerror(errno));
    return true;
}

/* KVM lists some MSRs that this vCPU doesn't have: reading them fails. */
static bool save_msrs(struct vcpu *vcpu, struct state_writer *w,
                      struct fail *why)
{
    struct kvm_msr_list *list =
        calloc(1, sizeof(*list) + MSRS_MAX * sizeof(list->indices[0]));
    struct kvm_msr_entry *entries = calloc(MSRS_MAX, sizeof(*entries));
    bool good = list && entries && list_msrs(vcpu, list, why);
    size_t count = 0;

    for (unsigned rank = 0; good && rank <= 3; rank++) {
        for (uint32_t i = 0; i < list->nmsrs; i++) {
            struct kvm_msr_entry *entry = &entries[count];

            entry->index = list->indices[i];
            if (msr_rank(entry->index) == rank && get_msr(vcpu, entry))
                count++;
        }
    }
    if (good)
        state_put(w, STATE_MSRS, vcpu->index, entries,
                  count * sizeof(*entries));
    free(list);
    free(entries);
    return good;
}

/* An MSR that can't be set does no harm if it has the value already. */
static bool load_msr(struct vcpu *vcpu, const struct kvm_msr_entry *entry,
                     struct fail *why)
{
    struct kvm_msr_entry ours = *entry;

    if (set_msr(vcpu, *entry))
        return true;
    if (get_msr(vcpu, &ours) && ours.data == entry->data)
        return true;
    return fail(why, "this host cannot set MSR 0x%x of vCPU %u to 0x%llx",
                entry->index, vcpu->index, (unsigned long long)entry->data);
}

static bool load_msrs(struct vcpu *vcpu, const struct state *state,
                      struct fail *why)
{
    const struct state_record *r = state_find(state, vcpu->index, STATE_MSRS);
    struct kvm_msr_entry entry;

    if (r->length % sizeof(entry) != 0)
        return fail(why, "the MSRs of vCPU %u have %u bytes", vcpu->index,
                    r->length);
    for (uint32_t at = 0; at < r->length; at += (uint32_t)sizeof(entry)) {
        memcpy(&entry, r->bytes + at, sizeof(entry));
        if (!load_msr(vcpu, &entry, why))
            return false;
    }
    return true;
}

/* All of it */

static bool save_parts(struct vcpu *vcpu, const struct part *parts,
                       size_t count, struct state_writer *w, struct fail *why)
{
    for (size_t i = 0; i < count; i++) {
        bool twice = parts[i].type == STATE_SREGS && has(vcpu, KVM_CAP_SREGS2);

        if (!twice && !save_part(vcpu, &parts[i], w, why))
            return false;
    }
    return true;
}

static bool load_parts(struct vcpu *vcpu, const struct part *parts,
                       size_t count, const struct state *state,
                       struct fail *why)
{
    for (size_t i = 0; i < count; i++) {
        if (!load_part(vcpu, &parts[i], state, why))
            return false;
    }
    return true;
}

bool vcpu_save(struct vcpu *vcpu, struct state_writer *w, struct fail *why)
{
    return save_parts(vcpu, before_msrs, COUNT(before_msrs), w, why) &&
           save_msrs(vcpu, w, why) &&
           save_parts(vcpu, after_msrs, COUNT(after_msrs), w, why);
}

/* What a vCPU can't do without; the rest depends on the host. */
static bool is_complete(const struct vcpu *vcpu, const struct state *state,
                        struct fail *why)
{
    static const enum state_type needed[] = { STATE_MP_STATE, STATE_REGS,
                                              STATE_XSAVE,    STATE_LAPIC,
                                              STATE_MSRS,     STATE_EVENTS };

    for (size_t i = 0; i < COUNT(needed); i++) {
        if (!state_find(state, vcpu->index, needed[i]))
            return fail(why, "the device state lacks record type %u of vCPU %u",
                        needed[i], vcpu->index);
    }
    if (!state_find(state, vcpu->index, STATE_SREGS) ==
        !state_find(state, vcpu->index, STATE_SREGS2))
        return fail(why,
                    "the device state has not one kind of system "
                    "registers of vCPU %u",
                    vcpu->index);
    return true;
}

bool vcpu_load(struct vcpu *vcpu, const struct state *state, struct fail *why)
{
    if (!is_complete(vcpu, state, why) ||
        !load_parts(vcpu, before_msrs, COUNT(before_msrs), state, why) ||
        !load_msrs(vcpu, state, why) ||
        !load_parts(vcpu, after_msrs, COUNT(after_msrs), state, why))
        return false;
    /* Tells a guest that uses KVM's clock; EINVAL from one that doesn't. */
    ioctl(vcpu->fd, KVM_KVMCLOCK_CTRL, 0);
    return true;
}
