#include "tcp.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int fail_and_close(int fd, struct fail *why, const char *what)
{
    fail(why, "cannot %s: %s", what, strerror(errno));
    if (fd >= 0)
        close(fd);
    return -1;
}

int tcp_listen(uint16_t *port, struct fail *why)
{
    struct sockaddr_in address = { .sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || bind(fd, (struct sockaddr *)&address, length) < 0 ||
        listen(fd, 4) < 0 ||
        getsockname(fd, (struct sockaddr *)&address, &length) < 0)
        return fail_and_close(fd, why, "listen on 127.0.0.1");
    *port = ntohs(address.sin_port);
    return fd;
}

static int without_delay(int fd, struct fail *why)
{
    int on = 1;

    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0)
        return fail_and_close(fd, why, "set TCP_NODELAY");
    return fd;
}

int tcp_accept(int listener, struct fail *why)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    if (fd < 0)
        return fail_and_close(fd, why, "accept a connection");
    return without_delay(fd, why);
}

int tcp_connect(const char *host, uint16_t port, struct fail *why)
{
    struct sockaddr_in address = { .sin_family = AF_INET,
                                   .sin_port = htons(port) };
    int fd;

    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fail(why, "'%s' is no IPv4 address", host);
        return -1;
    }
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return fail_and_close(fd, why, "connect");
    return without_delay(fd, why);
}

bool tcp_set_congestion(int fd, const char *congestion, struct fail *why)
{
    if (congestion && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion,
                                 (socklen_t)strlen(congestion)) < 0)
        return fail(why, "no congestion control '%s': %s", congestion,
                    strerror(errno));
    return true;
}

/* Leave out the first `done` bytes. */
static void advance(struct msghdr *m, size_t done)
{
    while (m->msg_iovlen > 0 && done >= m->msg_iov->iov_len) {
        done -= m->msg_iov->iov_len;
        m->msg_iov++;
        m->msg_iovlen--;
    }
    if (m->msg_iovlen > 0) {
        m->msg_iov->iov_base = (char *)m->msg_iov->iov_base + done;
        m->msg_iov->iov_len -= done;
    }
}

bool tcp_send(int fd, struct iovec *parts, size_t count, struct fail *why)
{
    struct msghdr m = { .msg_iov = parts, .msg_iovlen = count };

    while (m.msg_iovlen > 0) {
        ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL);

        if (n < 0 && errno != EINTR)
            return fail(why, "cannot send: %s", strerror(errno));
        if (n > 0)
            advance(&m, (size_t)n);
    }
    return true;
}

bool tcp_receive(int fd, struct iovec *parts, size_t count, struct fail *why)
{
    struct msghdr m = { .msg_iov = parts, .msg_iovlen = count };

    while (m.msg_iovlen > 0) {
        ssize_t n = recvmsg(fd, &m, MSG_WAITALL);

        if (n == 0)
            return fail(why, "the peer has ended the connection");
        if (n < 0 && errno != EINTR)
            return fail(why, "cannot receive: %s", strerror(errno));
        if (n > 0)
            advance(&m, (size_t)n);
    }
    return true;
}

bool tcp_send_bytes(int fd, const void *bytes, size_t length, struct fail *why)
{
    /* sendmsg only reads them, which a struct iovec can't say. */
    struct iovec part = { (void *)(uintptr_t)bytes, length };

    return tcp_send(fd, &part, 1, why);
}

bool tcp_receive_bytes(int fd, void *bytes, size_t length, struct fail *why)
{
    struct iovec part = { bytes, length };

    return tcp_receive(fd, &part, 1, why);
}
