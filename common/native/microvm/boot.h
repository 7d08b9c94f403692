/* Put a kernel into RAM and the first vCPU at its entry, as PVH wants it. */
#ifndef MICROVM_BOOT_H
#define MICROVM_BOOT_H

#include "ram.h"
#include "vm.h"

#define COMMAND_LINE_MAX 2048u

bool boot_kernel(struct vm *vm, const struct ram *ram, const char *path,
                 const char *command_line, struct fail *why);

#endif
