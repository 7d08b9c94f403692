/* Memory files, and memory that the machine under this one has given. */
#ifndef BENCH_MEMORY_H
#define BENCH_MEMORY_H

#include "fail.h"

#include <stdint.h>
#include <sys/types.h>

#define SMALL_PAGE 4096u
#define HUGE_PAGE (2u << 20)

/* A memfd of `length` bytes without a page; -1 and a sentence. */
int memory_file(uint64_t length, struct fail *why);

/* Map all of it, at a multiple of 2 MiB; NULL and a sentence. */
uint8_t *memory_map(int fd, uint64_t length, struct fail *why);

/*
 * Use `length` bytes and give them back. In a virtual machine the first touch
 * of memory in a long time makes the host find some; that is no part of what
 * is measured.
 */
bool memory_warm_up(uint64_t length, struct fail *why);

/* Bytes that a process uses besides shared memory; 0 if nobody knows. */
uint64_t memory_own(pid_t pid);

#endif
