#include "vcpu.h"
#include "guest/ports.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CPUID_ENTRIES 256u

/* Creating */

/* The leaves that tell a processor its own number. */
static void set_apic_id(struct kvm_cpuid_entry2 *entry, unsigned index)
{
    switch (entry->function) {
    case 0x1:
        entry->ebx = (entry->ebx & 0x00ffffffu) | index << 24;
        break;
    case 0xb:
    case 0x1f:
        entry->edx = index;
        break;
    case 0x8000001e:
        entry->eax = index;
        break;
    default:
        break;
    }
}

static bool set_cpuid(struct vcpu *vcpu, struct fail *why)
{
    struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) +
                  CPUID_ENTRIES * sizeof(struct kvm_cpuid_entry2));
    bool good;

    if (!cpuid)
        return fail(why, "no memory for the features of a vCPU");
    cpuid->nent = CPUID_ENTRIES;
    good = ioctl(vcpu->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0;
    for (uint32_t i = 0; good && i < cpuid->nent; i++)
        set_apic_id(&cpuid->entries[i], vcpu->index);
    good = good && ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) == 0;
    if (!good)
        fail(why, "cannot set the features of vCPU %u: %s", vcpu->index,
             strerror(errno));
    free(cpuid);
    return good;
}

static void run_guest(struct gate_thread *thread);

bool vcpu_create(struct vcpu *vcpu, int kvm, int vm, unsigned index,
                 struct serial *serial, struct fail *why)
{
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

    *vcpu = (struct vcpu){
        .kvm = kvm, .vm = vm, .index = index, .serial = serial };
    vcpu->fd = ioctl(vm, KVM_CREATE_VCPU, (unsigned long)index);
    if (vcpu->fd < 0 || size <= 0)
        return fail(why, "cannot create vCPU %u: %s", index, strerror(errno));
    vcpu->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED,
                     vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED)
        return fail(why, "cannot map vCPU %u: %s", index, strerror(errno));
    vcpu->thread.run = run_guest;
    vcpu->thread.kick = &vcpu->run->immediate_exit;
    return set_cpuid(vcpu, why);
}

bool vcpu_start_at(struct vcpu *vcpu, uint32_t entry, uint32_t start_info,
                   struct fail *why)
{
    const struct kvm_segment flat = {
        .limit = 0xffffffff, .present = 1, .db = 1, .s = 1, .g = 1 };
    struct kvm_regs regs = { .rip = entry, .rbx = start_info, .rflags = 2 };
    struct kvm_sregs sregs;

    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
        return fail(why, "cannot read the registers: %s", strerror(errno));
    sregs.cs = flat;
    sregs.cs.selector = 0x8;
    sregs.cs.type = 0xb;
    sregs.ds = flat;
    sregs.ds.selector = 0x10;
    sregs.ds.type = 0x3;
    sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.ds;
    sregs.tr = (struct kvm_segment){ .limit = 0x67, .type = 0xb, .present = 1 };
    sregs.cr0 = 0x11;
    sregs.cr4 = 0;
    if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 ||
        ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
        return fail(why, "cannot set the registers: %s", strerror(errno));
    return true;
}

/* Running */

static void write_port(struct vcpu *vcpu, uint16_t port, const uint8_t *data,
                       unsigned size)
{
    uint32_t value = 0;

    memcpy(&value, data, size);
    if (serial_has_port(port))
        serial_out(vcpu->serial, port, (uint8_t)value);
    else if (port == PORT_NAP)
        gate_nap(&vcpu->thread, value < 1000000 ? value : 1000000);
    else if (port == PORT_RESET && value == RESET_COMMAND)
        gate_end(&vcpu->thread, "the guest has reset itself");
}

/* A port without a device reads as all ones. */
static void read_port(struct vcpu *vcpu, uint16_t port, uint8_t *data,
                      unsigned size)
{
    memset(data, 0xff, size);
    if (serial_has_port(port))
        data[0] = serial_in(vcpu->serial, port);
}

static void handle_port(struct vcpu *vcpu)
{
    uint8_t *data = (uint8_t *)vcpu->run + vcpu->run->io.data_offset;
    unsigned size = vcpu->run->io.size;

    for (uint32_t i = 0; i < vcpu->run->io.count; i++, data += size) {
        if (vcpu->run->io.direction == KVM_EXIT_IO_OUT)
            write_port(vcpu, vcpu->run->io.port, data, size);
        else
            read_port(vcpu, vcpu->run->io.port, data, size);
    }
}

static unsigned long long instruction(const struct vcpu *vcpu)
{
    struct kvm_regs regs = { 0 };

    ioctl(vcpu->fd, KVM_GET_REGS, &regs);
    return regs.rip;
}

static void handle_exit(struct vcpu *vcpu)
{
    switch (vcpu->run->exit_reason) {
    case KVM_EXIT_IO:
        handle_port(vcpu);
        break;
    case KVM_EXIT_MMIO:
        /* Nothing there: reads are all ones, writes are lost. */
        if (!vcpu->run->mmio.is_write)
            memset(vcpu->run->mmio.data, 0xff, sizeof(vcpu->run->mmio.data));
        break;
    case KVM_EXIT_INTR:
        break;
    case KVM_EXIT_HLT:
        gate_end(&vcpu->thread, "vCPU %u halted for ever", vcpu->index);
        break;
    case KVM_EXIT_SHUTDOWN:
        gate_end(&vcpu->thread, "triple fault on vCPU %u at 0x%llx",
                 vcpu->index, instruction(vcpu));
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        gate_end(&vcpu->thread, "KVM cannot run vCPU %u on: internal error %u",
                 vcpu->index, vcpu->run->internal.suberror);
        break;
    default:
        gate_end(&vcpu->thread, "KVM cannot run vCPU %u on: exit reason %u",
                 vcpu->index, vcpu->run->exit_reason);
        break;
    }
}

/* False if the kernel did not enter the guest, or was called out of it. */
static bool enter_guest(struct vcpu *vcpu)
{
    if (ioctl(vcpu->fd, KVM_RUN, 0) == 0)
        return true;
    if (errno != EINTR && errno != EAGAIN)
        gate_end(&vcpu->thread, "KVM cannot run vCPU %u on: %s", vcpu->index,
                 strerror(errno));
    return false;
}

/*
 * The result of the last port access is in `run` only; entering once more with
 * immediate_exit set takes it into the registers, and no guest code runs.
 */
static void settle(struct vcpu *vcpu)
{
    vcpu->run->immediate_exit = 1;
    while (enter_guest(vcpu))
        handle_exit(vcpu);
}

static void run_guest(struct gate_thread *thread)
{
    struct vcpu *vcpu = (struct vcpu *)thread;

    for (;;) {
        gate_enter(thread);
        while (!*thread->kick) {
            if (enter_guest(vcpu))
                handle_exit(vcpu);
        }
        settle(vcpu);
        gate_leave(thread);
    }
}

/* State: the parts that are one struct each, in the order to set them */

struct part {
    enum state_type type;
    const char *name;
    unsigned long get;
    unsigned long set;
    size_t size;       /* 0: ask KVM (XSAVE) */
    long capability;   /* 0: every KVM has it */
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
    { STATE_REGS, "REGS", KVM_GET_REGS, KVM_SET_REGS,
      sizeof(struct kvm_regs), 0 },
    { STATE_XCRS, "XCRS", KVM_GET_XCRS, KVM_SET_XCRS,
      sizeof(struct kvm_xcrs), KVM_CAP_XCRS },
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
    return size > (int)sizeof(struct kvm_xsave) ? (size_t)size
                                                : sizeof(struct kvm_xsave);
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

/* State: the MSRs */

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

/* State: all of it */

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
    static const enum state_type needed[] = {
        STATE_MP_STATE, STATE_REGS, STATE_XSAVE, STATE_LAPIC, STATE_MSRS,
        STATE_EVENTS };

    for (size_t i = 0; i < COUNT(needed); i++) {
        if (!state_find(state, vcpu->index, needed[i]))
            return fail(why, "the device state lacks record type %u of vCPU %u",
                        needed[i], vcpu->index);
    }
    if (!state_find(state, vcpu->index, STATE_SREGS) ==
        !state_find(state, vcpu->index, STATE_SREGS2))
        return fail(why, "the device state has not one kind of system "
                    "registers of vCPU %u", vcpu->index);
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
