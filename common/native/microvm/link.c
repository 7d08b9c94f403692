#include "link.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONTROL_SIZE CMSG_SPACE(ATTACH_DESCRIPTORS_MAX * sizeof(int))

union control {
    char bytes[CONTROL_SIZE];
    struct cmsghdr align;
};

int link_connect(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -1;
    strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        int error = errno;

        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static void put_descriptors(struct msghdr *header, union control *control,
                            const int *descriptors, size_t count)
{
    struct cmsghdr *c;

    memset(control, 0, sizeof(*control));
    header->msg_control = control->bytes;
    header->msg_controllen = CMSG_SPACE(count * sizeof(int));
    c = CMSG_FIRSTHDR(header);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(c), descriptors, count * sizeof(int));
}

bool link_send(int fd, const char *text, const int *descriptors, size_t count)
{
    struct iovec part = { (char *)(uintptr_t)text, strlen(text) };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };
    union control control;
    ssize_t sent;

    if (count > 0)
        put_descriptors(&header, &control, descriptors, count);
    do {
        sent = sendmsg(fd, &header, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent >= 0;
}

static void take_descriptors(struct msghdr *header, struct packet *packet)
{
    struct cmsghdr *c;

    packet->descriptor_count = 0;
    for (c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        packet->descriptor_count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(packet->descriptors, CMSG_DATA(c),
               packet->descriptor_count * sizeof(int));
    }
}

bool link_receive(int fd, struct packet *packet)
{
    struct iovec part = { packet->bytes, sizeof(packet->bytes) };
    union control control;
    struct msghdr header = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control.bytes,
        .msg_controllen = sizeof(control.bytes),
    };
    ssize_t got;

    do {
        got = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0)
        return false;
    take_descriptors(&header, packet);
    packet->length = (size_t)got;
    /* An empty packet and the end look alike; neither is a message. */
    if (got > 0 && !(header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
        return true;
    packet_close(packet);
    return false;
}

void packet_close(struct packet *packet)
{
    for (size_t i = 0; i < packet->descriptor_count; i++)
        close(packet->descriptors[i]);
    packet->descriptor_count = 0;
}
