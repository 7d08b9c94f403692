#include "text.h"

static void add_byte(struct text *t, char byte)
{
    if (t->length < TEXT_MAX)
        t->bytes[t->length++] = byte;
}

void text_add(struct text *t, const char *word)
{
    for (; *word; word++)
        add_byte(t, *word);
}

static void add_in_base(struct text *t, uint64_t number, unsigned base)
{
    char digits[20];
    unsigned count = 0;

    do {
        digits[count++] = "0123456789abcdef"[number % base];
        number /= base;
    } while (number > 0);
    while (count > 0)
        add_byte(t, digits[--count]);
}

void text_add_number(struct text *t, uint64_t number)
{
    add_in_base(t, number, 10);
}

void text_add_hex(struct text *t, uint64_t number)
{
    text_add(t, "0x");
    add_in_base(t, number, 16);
}
