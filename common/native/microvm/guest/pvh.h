/*
 * The public PVH boot ABI, version 1: what a kernel finds at the address in
 * ebx. microvm writes it, the test guest reads it.
 */
#ifndef GUEST_PVH_H
#define GUEST_PVH_H

#include <stdint.h>

#define PVH_START_MAGIC 0x336ec578u
#define PVH_MEMORY_RAM 1u

/* All addresses are guest physical. */
struct pvh_start_info {
    uint32_t magic;
    uint32_t version;
    uint32_t flags;
    uint32_t modules;
    uint64_t module_list;
    uint64_t command_line;
    uint64_t rsdp;
    uint64_t memory_map;
    uint32_t memory_map_entries;
    uint32_t reserved;
};

struct pvh_memory {
    uint64_t address;
    uint64_t size;
    uint32_t type;
    uint32_t reserved;
};

#endif
