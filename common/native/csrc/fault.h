/*
 * The fault loop: answers the guest's page faults during postcopy.
 *
 * It outlives connections: while there is none, faults on pages that are here
 * are resolved and the others wait.
 */
#ifndef POSTCOPY_FAULT_H
#define POSTCOPY_FAULT_H

#include "place.h"

/* Runs until stop_fd is readable, or the kernel or the guest fails. */
struct result fault_run(struct destination *d, int stop_fd);

/*
 * There is a connection again: ask for every page that was asked for and is
 * missing. What the fault loop asks for meanwhile may be asked for twice.
 */
struct result fault_ask_again(struct destination *d);

#endif
