#include "stream_source.h"
#include "account.h"
#include "records.h"
#include "tcp.h"

#include <unistd.h>

uint64_t stream_word(uint64_t page)
{
    return (page + 1) * 0x9e3779b97f4a7c15u;
}

static uint8_t *filled_memory(uint64_t length, struct fail *why)
{
    int fd = memory_file(length, why);
    uint8_t *memory = fd < 0 ? NULL : memory_map(fd, length, why);
    uint64_t *words = (uint64_t *)memory;

    if (fd >= 0)
        close(fd);
    if (!memory)
        return NULL;
    for (uint64_t i = 0; i < length / sizeof(*words); i++)
        words[i] = stream_word(i * sizeof(*words) / SMALL_PAGE);
    return memory;
}

static bool send_pages(const struct stream_source *s, int fd, uint8_t *memory,
                       struct fail *why)
{
    static struct records records;
    uint64_t pages = s->length / SMALL_PAGE;

    for (uint64_t page = 0; page < pages; page += s->batch) {
        size_t parts = records_lay_out(&records, page,
                                       memory + page * SMALL_PAGE, s->batch);

        if (!tcp_send(fd, records.parts, parts, why))
            return false;
    }
    return true;
}

bool stream_source_run(const struct stream_source *s, int listener,
                       struct fail *why)
{
    struct stream_account account;
    uint8_t *memory = filled_memory(s->length, why);
    int fd = memory ? tcp_accept(listener, why) : -1;
    double start;
    char go;

    if (fd < 0 || !tcp_set_congestion(fd, s->congestion, why) ||
        !tcp_send_bytes(fd, "", 1, why) ||
        !tcp_receive_bytes(fd, &go, sizeof(go), why))
        return false;
    start = cpu_of_this_process();
    if (!send_pages(s, fd, memory, why))
        return false;
    account.cpu_seconds = cpu_of_this_process() - start;
    return tcp_send_bytes(fd, &account, sizeof(account), why);
}
