#include "error.h"

struct result result_ok(void)
{
    return (struct result){ .kind = RESULT_OK, .what = "" };
}

struct result result_of(enum result_kind kind, const char *what)
{
    return (struct result){ .kind = (int32_t)kind, .what = what };
}

struct result result_errno(enum result_kind kind, const char *what, int err)
{
    return (struct result){ .kind = (int32_t)kind, .what = what, .err = err };
}

struct result result_stream(const char *what, uint64_t offset, uint64_t got)
{
    return (struct result){
        .kind = RESULT_STREAM, .what = what, .offset = offset, .got = got
    };
}
