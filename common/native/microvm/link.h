/* The socket to the daemon: packets with descriptors. */
#ifndef MICROVM_LINK_H
#define MICROVM_LINK_H

#include "attach.h"

struct packet {
    char bytes[ATTACH_MESSAGE_MAX];
    size_t length;
    int descriptors[ATTACH_DESCRIPTORS_MAX]; /* the receiver's to close */
    size_t descriptor_count;
};

/* A connected socket; -1 and errno. `path` must fit a socket's address. */
int link_connect(const char *path);

/* False with errno set; EPIPE means that the daemon is gone. */
bool link_send(int fd, const char *text, const int *descriptors, size_t count);

/* Wait for a packet. False at the end of the connection or after an error. */
bool link_receive(int fd, struct packet *packet);

void packet_close(struct packet *packet);

#endif
