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
    struct kvm_cpuid2 *cpuid = calloc(
        1, sizeof(*cpuid) + CPUID_ENTRIES * sizeof(struct kvm_cpuid_entry2));
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

    *vcpu =
        (struct vcpu){ .kvm = kvm, .vm = vm, .index = index, .serial = serial };
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
        .limit = 0xffffffff, .present = 1, .db = 1, .s = 1, .g = 1
    };
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
