#include "attach.h"

#include <jansson.h>
#include <string.h>

/* Reading */

struct argument {
    bool name;  /* "name", 1 to ATTACH_NAME_MAX bytes */
    bool state; /* "version" and "length" */
};

static const struct {
    const char *word;
    enum attach_request request;
    struct argument needs;
} requests[] = {
    { "stop", ATTACH_STOP, { 0 } },
    { "cont", ATTACH_CONT, { 0 } },
    { "save", ATTACH_SAVE, { 0 } },
    { "load", ATTACH_LOAD, { .name = true, .state = true } },
    { "keep", ATTACH_KEEP, { .name = true } },
    { "forget", ATTACH_FORGET, { .name = true } },
    { "quit", ATTACH_QUIT, { 0 } },
};

#define REQUESTS (sizeof(requests) / sizeof(requests[0]))

/* Copy as much as fits of a string that may hold zero bytes. */
static void copy_text(char *to, size_t size, const json_t *string)
{
    size_t length = json_string_length(string);

    if (length >= size)
        length = size - 1;
    memcpy(to, json_string_value(string), length);
    to[length] = '\0';
}

static bool read_name(const json_t *arguments, struct attach_message *m,
                      struct fail *why)
{
    const json_t *name = json_object_get(arguments, "name");
    size_t length = json_string_length(name);

    if (!json_is_string(name) || length == 0 || length > ATTACH_NAME_MAX ||
        strlen(json_string_value(name)) != length)
        return fail(why, "'name' must be a string of 1 to %u bytes",
                    ATTACH_NAME_MAX);
    copy_text(m->name, sizeof(m->name), name);
    return true;
}

static bool read_integer(const json_t *object, const char *member,
                         json_int_t smallest, json_int_t greatest,
                         json_int_t *out, struct fail *why)
{
    const json_t *value = json_object_get(object, member);

    if (!json_is_integer(value) || json_integer_value(value) < smallest ||
        json_integer_value(value) > greatest)
        return fail(why, "'%s' must be an integer from %lld to %lld", member,
                    (long long)smallest, (long long)greatest);
    *out = json_integer_value(value);
    return true;
}

static bool read_state(const json_t *arguments, struct attach_message *m,
                       struct fail *why)
{
    json_int_t version = 0, length = 0;

    if (!read_integer(arguments, "version", 1, UINT32_MAX, &version, why) ||
        !read_integer(arguments, "length", 0, INT64_MAX, &length, why))
        return false;
    m->version = (uint32_t)version;
    m->length = (uint64_t)length;
    return true;
}

static bool read_arguments(const json_t *root, struct argument needs,
                           struct attach_message *m, struct fail *why)
{
    const json_t *arguments = json_object_get(root, "arguments");

    if (arguments && !json_is_object(arguments))
        return fail(why, "'arguments' must be an object");
    return (!needs.name || read_name(arguments, m, why)) &&
           (!needs.state || read_state(arguments, m, why));
}

static bool read_request(const json_t *root, const json_t *request,
                         struct attach_message *m, struct fail *why)
{
    json_int_t id = 0;

    m->kind = ATTACH_REQUEST;
    if (!json_is_string(request))
        return fail(why, "'request' must be a string");
    if (!read_integer(root, "id", 0, INT64_MAX, &id, why))
        return false;
    m->id = id;
    for (size_t i = 0; i < REQUESTS; i++) {
        if (strcmp(json_string_value(request), requests[i].word) == 0) {
            m->request = requests[i].request;
            return read_arguments(root, requests[i].needs, m, why);
        }
    }
    copy_text(m->text, sizeof(m->text), request);
    return true;
}

static bool read_attached(const json_t *attached, struct attach_message *m,
                          struct fail *why)
{
    json_int_t version = 0;

    m->kind = ATTACH_ATTACHED;
    if (!read_integer(attached, "version", ATTACH_VERSION, ATTACH_VERSION,
                      &version, why))
        return false;
    m->version = (uint32_t)version;
    return true;
}

static bool read_refused(const json_t *refused, struct attach_message *m,
                         struct fail *why)
{
    const json_t *reason = json_object_get(refused, "reason");

    m->kind = ATTACH_REFUSED;
    if (!json_is_string(reason))
        return fail(why, "'reason' must be a string");
    copy_text(m->text, sizeof(m->text), reason);
    return true;
}

static bool read_message(const json_t *root, struct attach_message *m,
                         struct fail *why)
{
    const json_t *member;

    if ((member = json_object_get(root, "request")))
        return read_request(root, member, m, why);
    if ((member = json_object_get(root, "attached")))
        return read_attached(member, m, why);
    if ((member = json_object_get(root, "refused")))
        return read_refused(member, m, why);
    return fail(why, "neither a request nor 'attached' nor 'refused'");
}

bool attach_parse(const void *bytes, size_t length, struct attach_message *m,
                  struct fail *why)
{
    json_error_t error;
    json_t *root;
    bool good;

    *m = (struct attach_message){ 0 };
    if (length > ATTACH_MESSAGE_MAX)
        return fail(why, "a message of more than %u bytes", ATTACH_MESSAGE_MAX);
    root = json_loadb(bytes, length, JSON_REJECT_DUPLICATES, &error);
    if (!root)
        return fail(why, "not JSON: %s", error.text);
    good = json_is_object(root) ? read_message(root, m, why) :
                                  fail(why, "not a JSON object");
    json_decref(root);
    return good;
}

/* Writing. json_pack() takes over what is given for an "o"; NULL is an error */

static char *dump(json_t *root)
{
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;

    json_decref(root);
    return text;
}

static json_t *thread_array(const pid_t *threads, size_t count)
{
    json_t *array = json_array();

    for (size_t i = 0; i < count; i++)
        json_array_append_new(array, json_integer(threads[i]));
    return array;
}

static json_t *string_array(const char *const *strings, size_t count)
{
    json_t *array = json_array();

    for (size_t i = 0; i < count; i++)
        json_array_append_new(array, json_string(strings[i]));
    return array;
}

static json_t *block_array(const struct attach_hello *h)
{
    return json_pack("[{s:s, s:I, s:I, s:I, s:I}]", "idstr", h->idstr, "length",
                     (json_int_t)h->length, "page-size",
                     (json_int_t)h->page_size, "base", (json_int_t)h->base,
                     "guest-address", (json_int_t)h->guest_address);
}

char *attach_hello_text(const struct attach_hello *h)
{
    return dump(json_pack(
        "{s:{s:i, s:s, s:{s:s, s:I}, s:s, s:i, s:o, s:o, s:o, s:s*}}", "attach",
        "version", ATTACH_VERSION, "machine", h->machine, "device", "name",
        h->device, "version", (json_int_t)h->device_version, "state", h->state,
        "pid", (int)h->pid, "vcpus", thread_array(h->vcpus, h->vcpu_count),
        "blocks", block_array(h), "descriptors",
        string_array(h->descriptors, h->descriptor_count), "no-userfaultfd",
        h->no_userfaultfd));
}

char *attach_return_text(int64_t id)
{
    return dump(json_pack("{s:{}, s:I}", "return", "id", (json_int_t)id));
}

char *attach_saved_text(int64_t id, uint64_t length)
{
    return dump(json_pack("{s:{s:I}, s:I, s:[s]}", "return", "length",
                          (json_int_t)length, "id", (json_int_t)id,
                          "descriptors", "state"));
}

char *attach_error_text(int64_t id, const char *sentence)
{
    return dump(
        json_pack("{s:s, s:I}", "error", sentence, "id", (json_int_t)id));
}

char *attach_shutdown_text(const char *reason)
{
    return dump(json_pack("{s:s, s:{s:s}}", "event", "shutdown", "data",
                          "reason", reason));
}
