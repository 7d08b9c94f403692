#include "settings.h"

/* What follows `key` in `word`; NULL if the word starts otherwise. */
static const char *after(const char *word, const char *key)
{
    while (*key && *word == *key) {
        word++;
        key++;
    }
    return *key ? NULL : word;
}

static bool ends(char byte)
{
    return byte == ' ' || byte == '\0';
}

static uint64_t parse_size(const char *text)
{
    uint64_t number = 0;

    for (; *text >= '0' && *text <= '9'; text++)
        number = number * 10 + (uint64_t)(*text - '0');
    switch (*text) {
    case 'G':
        return number << 30;
    case 'M':
        return number << 20;
    case 'K':
        return number << 10;
    default:
        return number;
    }
}

static uint32_t clamp_vcpus(uint64_t number)
{
    if (number < 1)
        return 1;
    return number > REPORT_VCPUS ? REPORT_VCPUS : (uint32_t)number;
}

static void parse_word(struct settings *s, const char *word)
{
    const char *value;

    if ((value = after(word, "area=")))
        s->area = parse_size(value);
    else if ((value = after(word, "seed=")))
        s->seed = parse_size(value);
    else if ((value = after(word, "write-rate=")))
        s->write_rate = parse_size(value);
    else if ((value = after(word, "sweep=")))
        s->sweep = parse_size(value);
    else if ((value = after(word, "vcpus=")))
        s->vcpus = clamp_vcpus(parse_size(value));
    else if ((value = after(word, "tsc-khz=")))
        s->tsc_khz = parse_size(value);
    else if ((value = after(word, "rest=halt")) && ends(*value))
        s->halt = true;
    else if ((value = after(word, "read-only")) && ends(*value))
        s->mode = REPORT_READING;
    else if ((value = after(word, "idle")) && ends(*value))
        s->mode = REPORT_IDLE;
}

struct settings settings_parse(const char *line)
{
    struct settings s = { .seed = 1, .sweep = 8, .vcpus = 1 };

    while (*line) {
        parse_word(&s, line);
        while (!ends(*line))
            line++;
        while (*line == ' ')
            line++;
    }
    return s;
}
