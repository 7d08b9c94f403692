/* Lines of text, put together without a C library. */
#ifndef GUEST_TEXT_H
#define GUEST_TEXT_H

#include <stddef.h>
#include <stdint.h>

#define TEXT_MAX 256u

/* Never longer than TEXT_MAX: what does not fit is left out. */
struct text {
    size_t length;
    char bytes[TEXT_MAX];
};

void text_add(struct text *t, const char *word);
void text_add_number(struct text *t, uint64_t number);
void text_add_hex(struct text *t, uint64_t number);

#endif
