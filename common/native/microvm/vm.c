#include "vm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Three pages below 4 GiB that old Intel processors need; not in RAM. */
#define TSS_ADDRESS 0xfffbd000ul

static int open_kvm(struct fail *why)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    if (kvm < 0) {
        fail(why, "cannot open /dev/kvm: %s", strerror(errno));
        return -1;
    }
    if (ioctl(kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION ||
        ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_SPLIT_IRQCHIP) <= 0 ||
        ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0) {
        fail(why, "this kernel's KVM is too old");
        close(kvm);
        return -1;
    }
    return kvm;
}

bool vm_is_possible(struct fail *why)
{
    int kvm = open_kvm(why);

    if (kvm < 0)
        return false;
    close(kvm);
    return true;
}

static bool add_memory(struct vm *vm, uint32_t slot, uint64_t address,
                       uint64_t length, const uint8_t *at, struct fail *why)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .guest_phys_addr = address,
        .memory_size = length,
        .userspace_addr = (uintptr_t)at,
    };

    if (length > 0 && ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return fail(why, "KVM does not take the RAM at 0x%llx: %s",
                    (unsigned long long)address, strerror(errno));
    return true;
}

static bool add_ram(struct vm *vm, const struct ram *ram, struct fail *why)
{
    uint64_t low = ram_low(ram);

    return add_memory(vm, 0, 0, low, ram->base, why) &&
           add_memory(vm, 1, RAM_HIGH, ram->length - low, ram->base + low, why);
}

/* Local APICs in the kernel and no other interrupt controller. */
static bool add_apics(struct vm *vm, struct fail *why)
{
    struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP };

    if (ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_ADDRESS) < 0 ||
        ioctl(vm->fd, KVM_ENABLE_CAP, &split) < 0)
        return fail(why, "KVM has no local APICs: %s", strerror(errno));
    return true;
}

static bool add_vcpus(struct vm *vm, unsigned count, struct serial *serial,
                      struct fail *why)
{
    for (unsigned i = 0; i < count; i++) {
        struct vcpu *vcpu = &vm->vcpus[i];

        if (!vcpu_create(vcpu, vm->kvm, vm->fd, i, serial, why))
            return false;
    }
    /* All of them exist before the first one looks around. */
    for (unsigned i = 0; i < count; i++) {
        if (!gate_start(&vm->engine.gate, &vm->vcpus[i].thread, why))
            return false;
    }
    return true;
}

/* State */

static bool save_clock(struct vm *vm, struct state_writer *w, struct fail *why)
{
    struct kvm_clock_data clock;

    if (ioctl(vm->fd, KVM_GET_CLOCK, &clock) < 0)
        return fail(why, "cannot read KVM's clock: %s", strerror(errno));
    state_put(w, STATE_CLOCK, STATE_WHOLE_VM, &clock, sizeof(clock));
    return true;
}

/* The flags say how the value was read, which setting it does not accept. */
static bool load_clock(struct vm *vm, const struct state *state,
                       struct fail *why)
{
    const struct state_record *r =
        state_find(state, STATE_WHOLE_VM, STATE_CLOCK);
    struct kvm_clock_data saved, clock = { 0 };

    if (!r || r->length != sizeof(saved))
        return fail(why, "the device state lacks KVM's clock");
    memcpy(&saved, r->bytes, sizeof(saved));
    clock.clock = saved.clock;
    if (ioctl(vm->fd, KVM_SET_CLOCK, &clock) < 0)
        return fail(why, "cannot set KVM's clock: %s", strerror(errno));
    return true;
}

static bool save(struct engine *engine, struct state_writer *w,
                 struct fail *why)
{
    struct vm *vm = (struct vm *)engine;

    state_begin(w, STATE_KVM, engine->vcpus);
    for (unsigned i = 0; i < engine->vcpus; i++) {
        if (!vcpu_save(&vm->vcpus[i], w, why))
            return false;
    }
    return save_clock(vm, w, why) && state_end(w, why);
}

static bool load(struct engine *engine, const struct state *state,
                 struct fail *why)
{
    struct vm *vm = (struct vm *)engine;

    if (state->accel != STATE_KVM)
        return fail(why, "the device state is not of a KVM guest");
    for (unsigned i = 0; i < engine->vcpus; i++) {
        if (!vcpu_load(&vm->vcpus[i], state, why))
            return false;
    }
    return load_clock(vm, state, why);
}

bool vm_create(struct vm *vm, const struct ram *ram, unsigned vcpus,
               struct serial *serial, struct fail *why)
{
    vm->engine = (struct engine){
        .device = "microvm", .vcpus = vcpus, .save = save, .load = load
    };
    vm->kvm = open_kvm(why);
    if (vm->kvm < 0)
        return false;
    vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0ul);
    if (vm->fd < 0)
        return fail(why, "cannot create a virtual machine: %s",
                    strerror(errno));
    return gate_create(&vm->engine.gate, why) && add_ram(vm, ram, why) &&
           add_apics(vm, why) && add_vcpus(vm, vcpus, serial, why);
}

uint64_t vm_tsc_khz(const struct vm *vm)
{
    int khz = ioctl(vm->vcpus[0].fd, KVM_GET_TSC_KHZ, 0);

    return khz > 0 ? (uint64_t)khz : 0;
}
