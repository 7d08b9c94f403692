/* The attach messages as microvm reads and writes them. */
#include "attach.h"
#include "check.h"

#include <jansson.h>
#include <stdlib.h>

static struct attach_message message;
static struct fail why;

static bool parse(const char *text)
{
    return attach_parse(text, strlen(text), &message, &why);
}

/* The value at a path of members and, for arrays, indexes; both as words. */
static const json_t *at(const json_t *value, const char *const *path)
{
    for (; *path; path++)
        value = json_is_array(value) ?
                    json_array_get(value, (size_t)atoi(*path)) :
                    json_object_get(value, *path);
    return value;
}

#define AT(root, ...) at(root, (const char *const[]){ __VA_ARGS__, NULL })

/* Reading */

static void test_attached(void)
{
    CHECK(parse("{\"attached\": {\"version\": 1}}"));
    CHECK_EQ(message.kind, ATTACH_ATTACHED);
    CHECK_EQ(message.version, 1);
}

static void test_attached_other_version(void)
{
    CHECK(!parse("{\"attached\": {\"version\": 2}}"));
    CHECK(!parse("{\"attached\": {}}"));
    CHECK(!parse("{\"attached\": 1}"));
}

static void test_refused(void)
{
    CHECK(parse("{\"refused\": {\"reason\": \"no block\"}}"));
    CHECK_EQ(message.kind, ATTACH_REFUSED);
    CHECK_TEXT(message.text, "no block");
    CHECK(!parse("{\"refused\": {}}"));
}

static void test_refused_long_reason_is_cut(void)
{
    char text[2000];

    snprintf(text, sizeof(text), "{\"refused\": {\"reason\": \"%01000d\"}}", 0);
    CHECK(parse(text));
    CHECK_EQ(strlen(message.text), ATTACH_TEXT_MAX);
}

static void test_plain_requests(void)
{
    static const struct {
        const char *text;
        enum attach_request request;
    } cases[] = {
        { "{\"request\": \"stop\", \"id\": 7}", ATTACH_STOP },
        { "{\"request\": \"cont\", \"id\": 7, \"arguments\": {}}",
          ATTACH_CONT },
        { "{\"id\": 7, \"request\": \"save\", \"x\": [null]}", ATTACH_SAVE },
        { "{\"request\": \"quit\", \"id\": 7, \"arguments\": {\"a\": 1}}",
          ATTACH_QUIT },
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        CHECK(parse(cases[i].text));
        CHECK_EQ(message.kind, ATTACH_REQUEST);
        CHECK_EQ(message.request, cases[i].request);
        CHECK_EQ(message.id, 7);
    }
}

static void test_unknown_request_is_a_message(void)
{
    CHECK(parse("{\"request\": \"dance\", \"id\": 0, \"arguments\": {}}"));
    CHECK_EQ(message.request, ATTACH_UNKNOWN);
    CHECK_TEXT(message.text, "dance");
}

static void test_load(void)
{
    CHECK(parse("{\"request\": \"load\", \"id\": 9223372036854775807,"
                " \"arguments\": {\"name\": \"microvm\","
                " \"version\": 4294967295, \"length\": 12}}"));
    CHECK_EQ(message.id, INT64_MAX);
    CHECK_EQ(message.version, UINT32_MAX);
    CHECK_EQ(message.length, 12);
    CHECK_TEXT(message.name, "microvm");
}

static void test_load_refused(void)
{
    static const char *const arguments[] = {
        "{}",
        "{\"name\": \"a\", \"version\": 1}",
        "{\"name\": \"a\", \"length\": 1}",
        "{\"version\": 1, \"length\": 1}",
        "{\"name\": 1, \"version\": 1, \"length\": 1}",
        "{\"name\": \"a\", \"version\": 0, \"length\": 1}",
        "{\"name\": \"a\", \"version\": 4294967296, \"length\": 1}",
        "{\"name\": \"a\", \"version\": 1.0, \"length\": 1}",
        "{\"name\": \"a\", \"version\": true, \"length\": 1}",
        "{\"name\": \"a\", \"version\": 1, \"length\": -1}",
        "{\"name\": \"a\", \"version\": 1, \"length\": 9223372036854775808}",
        "[]",
        "null",
    };
    char text[200];

    for (size_t i = 0; i < sizeof(arguments) / sizeof(arguments[0]); i++) {
        snprintf(text, sizeof(text),
                 "{\"request\": \"load\", \"id\": 1, \"arguments\": %s}",
                 arguments[i]);
        CHECK(!parse(text));
        CHECK(strlen(why.text) > 0);
    }
    CHECK(!parse("{\"request\": \"load\", \"id\": 1}"));
}

static void test_name_bounds(void)
{
    char text[512];

    for (int length = 0; length <= 300; length++) {
        char name[301] = { 0 };

        memset(name, 'n', (size_t)length);
        snprintf(text, sizeof(text),
                 "{\"request\": \"keep\", \"id\": 1,"
                 " \"arguments\": {\"name\": \"%s\"}}",
                 name);
        CHECK_EQ(parse(text), length >= 1 && length <= 255);
        if (length >= 1 && length <= 255)
            CHECK_TEXT(message.name, name);
    }
}

static void test_name_with_zero_byte(void)
{
    CHECK(!parse("{\"request\": \"forget\", \"id\": 1,"
                 " \"arguments\": {\"name\": \"a\\u0000b\"}}"));
}

static void test_bad_ids(void)
{
    CHECK(!parse("{\"request\": \"stop\"}"));
    CHECK(!parse("{\"request\": \"stop\", \"id\": -1}"));
    CHECK(!parse("{\"request\": \"stop\", \"id\": \"1\"}"));
    CHECK(!parse("{\"request\": \"stop\", \"id\": 1e3}"));
    CHECK(!parse("{\"request\": \"stop\", \"id\": 9223372036854775808}"));
}

static void test_no_message(void)
{
    static const char *const texts[] = {
        "",
        "{",
        "[]",
        "{}",
        "null",
        "1",
        "\"stop\"",
        "{\"request\": 1}",
        "{\"request\": \"stop\", \"id\": 1} x",
        "{\"request\": \"stop\", \"id\": 1, \"id\": 2}",
        "{\"request\": \"\xff\", \"id\": 1}",
        "{'request': 'stop', 'id': 1}",
    };

    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
        CHECK(!parse(texts[i]));
}

static void test_size_bound(void)
{
    static char text[ATTACH_MESSAGE_MAX + 1];
    const char *request = "{\"request\": \"stop\", \"id\": 1}";

    memset(text, ' ', sizeof(text));
    memcpy(text, request, strlen(request));
    CHECK(attach_parse(text, ATTACH_MESSAGE_MAX, &message, &why));
    CHECK(!attach_parse(text, ATTACH_MESSAGE_MAX + 1, &message, &why));
}

static void test_cut_everywhere(void)
{
    const char *text =
        "{\"request\": \"load\", \"id\": 1, \"arguments\": "
        "{\"name\": \"microvm\", \"version\": 1, \"length\": 12}}";
    size_t length = strlen(text);

    for (size_t cut = 0; cut < length; cut++)
        CHECK(!attach_parse(text, cut, &message, &why));
    CHECK(attach_parse(text, length, &message, &why));
}

/* Writing */

static const pid_t threads[] = { 12, 13 };
static const char *const names[] = { "userfaultfd", "pagemap", "block:ram" };

static const struct attach_hello hello = {
    .machine = "m",
    .device = "d",
    .device_version = UINT32_MAX,
    .state = "running",
    .pid = 11,
    .vcpus = threads,
    .vcpu_count = 2,
    .idstr = "ram",
    .length = 1ull << 40,
    .page_size = 4096,
    .base = 0x7f0000000000,
    .guest_address = 0,
    .descriptors = names,
    .descriptor_count = 3,
};

/* What the text holds; the text itself is freed. */
static json_t *read_back(char *text)
{
    json_t *root = text ? json_loads(text, JSON_REJECT_DUPLICATES, NULL) : NULL;

    free(text);
    return root;
}

static void test_hello(void)
{
    json_t *root = read_back(attach_hello_text(&hello));

    CHECK(root);
    CHECK_EQ(json_integer_value(AT(root, "attach", "version")), 1);
    CHECK_TEXT(json_string_value(AT(root, "attach", "machine")), "m");
    CHECK_TEXT(json_string_value(AT(root, "attach", "device", "name")), "d");
    CHECK_EQ(json_integer_value(AT(root, "attach", "device", "version")),
             UINT32_MAX);
    CHECK_EQ(json_integer_value(AT(root, "attach", "vcpus", "1")), 13);
    CHECK_EQ(json_integer_value(AT(root, "attach", "blocks", "0", "length")),
             1ull << 40);
    CHECK_EQ(json_integer_value(AT(root, "attach", "blocks", "0", "base")),
             0x7f0000000000);
    CHECK_TEXT(json_string_value(AT(root, "attach", "descriptors", "2")),
               "block:ram");
    CHECK(!AT(root, "attach", "no-userfaultfd"));
    json_decref(root);
}

static void test_hello_without_userfaultfd(void)
{
    struct attach_hello without = hello;
    json_t *root;

    without.no_userfaultfd = "not permitted";
    root = read_back(attach_hello_text(&without));
    CHECK_TEXT(json_string_value(AT(root, "attach", "no-userfaultfd")),
               "not permitted");
    json_decref(root);
}

static void test_hello_not_utf8(void)
{
    struct attach_hello bad = hello;

    bad.machine = "\xff";
    CHECK(!attach_hello_text(&bad));
}

static void test_answers(void)
{
    char *text = attach_return_text(INT64_MAX);

    CHECK_TEXT(text, "{\"return\":{},\"id\":9223372036854775807}");
    free(text);
    text = attach_saved_text(3, 99);
    CHECK_TEXT(text, "{\"return\":{\"length\":99},\"id\":3,"
                     "\"descriptors\":[\"state\"]}");
    free(text);
    text = attach_error_text(4, "say \"no\"");
    CHECK_TEXT(text, "{\"error\":\"say \\\"no\\\"\",\"id\":4}");
    free(text);
    text = attach_shutdown_text("halted");
    CHECK_TEXT(text, "{\"event\":\"shutdown\",\"data\":"
                     "{\"reason\":\"halted\"}}");
    free(text);
}

int main(void)
{
    RUN(test_attached);
    RUN(test_attached_other_version);
    RUN(test_refused);
    RUN(test_refused_long_reason_is_cut);
    RUN(test_plain_requests);
    RUN(test_unknown_request_is_a_message);
    RUN(test_load);
    RUN(test_load_refused);
    RUN(test_name_bounds);
    RUN(test_name_with_zero_byte);
    RUN(test_bad_ids);
    RUN(test_no_message);
    RUN(test_size_bound);
    RUN(test_cut_everywhere);
    RUN(test_hello);
    RUN(test_hello_without_userfaultfd);
    RUN(test_hello_not_utf8);
    RUN(test_answers);
    return check_status();
}
