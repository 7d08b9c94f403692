/*
 * The guest's RAM, one memfd, and the descriptors by which a daemon moves it.
 * They all live as long as the process.
 */
#ifndef MICROVM_RAM_H
#define MICROVM_RAM_H

#include "fail.h"

#include <stdint.h>

#define RAM_IDSTR "ram"
#define RAM_SMALL_PAGE 4096u
#define RAM_HUGE_PAGE (2u << 20)

/*
 * Devices of the processor lie below 4 GiB, so guest addresses have a hole
 * there: RAM past RAM_LOW_MAX continues at RAM_HIGH.
 */
#define RAM_LOW_MAX (3ull << 30)
#define RAM_HIGH (4ull << 30)

struct ram {
    uint8_t *base; /* multiple of 2 MiB */
    uint64_t length;
    uint64_t page_size;
    int memfd;
    int userfaultfd; /* raw: no ioctl done on it; -1: see the reason */
    struct fail no_userfaultfd;
    int pagemap;
};

/*
 * `for_kernel`: the kernel itself (KVM) touches the memory, so faults in
 * kernel mode must be delivered too. Without the right to a userfaultfd there
 * is a guest all the same: the daemon decides whether that will do.
 */
bool ram_create(struct ram *ram, uint64_t length, uint64_t page_size,
                bool for_kernel, struct fail *why);

uint64_t ram_low(const struct ram *ram);

#endif
