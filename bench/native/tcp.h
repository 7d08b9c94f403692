/*
 * TCP with blocking sockets and no more. Every function that returns bool or
 * a descriptor leaves a sentence when it returns false or -1.
 */
#ifndef BENCH_TCP_H
#define BENCH_TCP_H

#include "fail.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* A socket that listens on 127.0.0.1; `*port` is the one it was given. */
int tcp_listen(uint16_t *port, struct fail *why);

/* Connections have TCP_NODELAY. */
int tcp_accept(int listener, struct fail *why);
int tcp_connect(const char *host, uint16_t port, struct fail *why);

/* `congestion` is a congestion control the kernel has; NULL: as it is. */
bool tcp_set_congestion(int fd, const char *congestion, struct fail *why);

/*
 * Send or receive all of it. The vectors are used up on the way. Receiving
 * fails when the peer ends the connection before.
 */
bool tcp_send(int fd, struct iovec *parts, size_t count, struct fail *why);
bool tcp_receive(int fd, struct iovec *parts, size_t count, struct fail *why);
bool tcp_send_bytes(int fd, const void *bytes, size_t length, struct fail *why);
bool tcp_receive_bytes(int fd, void *bytes, size_t length, struct fail *why);

#endif
