/*
 * The daemon that fills a parked VM by postcopy, while others serve it already:
 * it passes on what these ask for. See arriving.h.
 */
#ifndef POSTCOPY_UPSTREAM_H
#define POSTCOPY_UPSTREAM_H

#include "arriving.h"
#include "destination.h"

/*
 * Pass what comes at the socket `fd` on to where the VM comes from, until
 * stop_fd is readable. What is here, what is no page of the VM, and what comes
 * while there is no connection is dropped.
 */
struct result upstream_answer(struct destination *d, int fd, int stop_fd);

#endif
