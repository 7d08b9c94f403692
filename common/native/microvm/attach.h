/*
 * Messages of the attach protocol (docs/attach-protocol.md): bytes to structs
 * and structs to bytes. No descriptor, no socket, no state; see link.h for the
 * socket and control.c for what the messages mean.
 */
#ifndef MICROVM_ATTACH_H
#define MICROVM_ATTACH_H

#include "fail.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define ATTACH_VERSION 1
#define ATTACH_MESSAGE_MAX 65536u
#define ATTACH_DESCRIPTORS_MAX 128u
#define ATTACH_NAME_MAX 255u
#define ATTACH_TEXT_MAX 511u

/* What the daemon says. */

enum attach_kind {
    ATTACH_ATTACHED = 1,
    ATTACH_REFUSED,
    ATTACH_REQUEST,
};

enum attach_request {
    ATTACH_UNKNOWN = 0, /* answered with an error; `text` is its name */
    ATTACH_STOP,
    ATTACH_CONT,
    ATTACH_SAVE,
    ATTACH_LOAD,
    ATTACH_KEEP,
    ATTACH_FORGET,
    ATTACH_QUIT,
};

/* Members that a message doesn't have are 0 or "". */
struct attach_message {
    enum attach_kind kind;
    enum attach_request request;
    int64_t id;
    uint32_t version; /* of the protocol in ATTACHED, of the state in LOAD */
    uint64_t length;  /* LOAD: bytes of device state */
    char name[ATTACH_NAME_MAX + 1]; /* LOAD: of the device; KEEP, FORGET */
    char text[ATTACH_TEXT_MAX + 1]; /* REFUSED: why; cut if longer */
};

/*
 * Read one packet. False if it is no message of the protocol; the connection
 * is then to be closed.
 */
bool attach_parse(const void *bytes, size_t length, struct attach_message *m,
                  struct fail *why);

/* What the VMM says. Each returns text to be freed, or NULL without memory. */

struct attach_hello {
    const char *machine;
    const char *device;
    uint32_t device_version;
    const char *state; /* "running", "paused" or "incoming" */
    pid_t pid;
    const pid_t *vcpus;
    size_t vcpu_count;
    const char *idstr;
    uint64_t length;
    uint64_t page_size;
    uint64_t base;
    uint64_t guest_address;
    const char *const *descriptors;
    size_t descriptor_count;
    const char *no_userfaultfd; /* why there is none; NULL if there is one */
};

char *attach_hello_text(const struct attach_hello *hello);
char *attach_return_text(int64_t id);
char *attach_saved_text(int64_t id, uint64_t length);
char *attach_error_text(int64_t id, const char *sentence);
char *attach_shutdown_text(const char *reason);

#endif
