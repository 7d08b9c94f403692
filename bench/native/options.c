#include "options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* By how many bits to shift; -1 for something else than one of the units. */
static int shift_of(const char *unit)
{
    static const char units[] = "KMG";
    const char *found;

    if (!*unit)
        return 0;
    found = strchr(units, *unit);
    return found && !unit[1] ? 10 * (int)(found - units + 1) : -1;
}

bool option_size(const char *name, const char *text, uint64_t max,
                 uint64_t *size, struct fail *why)
{
    unsigned long long number;
    char *end;
    int shift;

    errno = 0;
    number = strtoull(text, &end, 10);
    shift = shift_of(end);
    if (end == text || text[0] == '-' || errno || shift < 0 ||
        number > max >> shift)
        return fail(why, "%s is at most %llu, not '%s'", name,
                    (unsigned long long)max, text);
    *size = number << shift;
    return true;
}

bool option_count(const char *name, const char *text, unsigned max,
                  unsigned *count, struct fail *why)
{
    uint64_t number = 0;

    if (!option_size(name, text, max, &number, why))
        return false;
    *count = (unsigned)number;
    return true;
}
