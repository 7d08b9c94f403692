#include "load.h"

#include "turn.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

struct result loader_open(struct loader *l, struct destination *d,
                          struct channel *channel, bool preempt)
{
    void *scratch;

    memset(l, 0, sizeof(*l));
    l->d = d;
    l->channel = channel;
    l->preempt = preempt;
    l->scratch_length = d->zeroes_length;
    /* Untouched until a huge page has to be copied into place. */
    scratch = mmap(NULL, l->scratch_length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (scratch == MAP_FAILED) {
        return result_errno(RESULT_HOST, "mmap of a scratch page", errno);
    }
    l->scratch = scratch;
    return result_ok();
}

/* Of a host page under way only a part came: it is missing as before. */
static void assembly_abandon(struct assembly *a)
{
    if (a->block && !a->dropped) {
        bitmap_test_and_clear(&a->block->claimed, a->host);
    }
    a->block = NULL;
}

void loader_close(struct loader *l)
{
    assembly_abandon(&l->assembly);
    if (l->scratch) {
        munmap(l->scratch, l->scratch_length);
    }
    l->scratch = NULL;
}

static bool in_postcopy(const struct loader *l)
{
    return __atomic_load_n(&l->d->listening, __ATOMIC_SEQ_CST);
}

static struct result bad_stream(struct loader *l, const char *why, uint64_t got)
{
    return result_stream(why, channel_position(l->channel), got);
}

/* --- runs of ordinary pages --------------------------------------------- */

/*
 * Claim page by page; a page that is here already (sent twice) splits the run
 * and is dropped.
 */
static struct result place_claimed(struct loader *l, struct run *run)
{
    uint32_t from = 0;

    for (uint32_t i = 0; i <= run->count; i++) {
        struct result r;

        if (i < run->count && place_claim(l->d, run->block, run->page + i)) {
            continue;
        }
        if (i > from) {
            r = place_pages(l->d, run->block, run->page + from, run->iov + from,
                            i - from);
            if (!RESULT_IS_OK(r)) {
                return r;
            }
        }
        from = i + 1;
    }
    return result_ok();
}

static struct result run_flush(struct loader *l)
{
    struct run *run = &l->run;
    struct result r = result_ok();

    if (run->count) {
        r = in_postcopy(l) ?
                place_claimed(l, run) :
                place_early(l->d, run->block, run->page, run->iov, run->count);
    }
    run->count = 0;
    return r;
}

static struct result run_add(struct loader *l, struct ram_block *b,
                             uint64_t page, uint8_t *data)
{
    struct run *run = &l->run;
    struct result r = result_ok();

    if (run->count == RUN_PAGES || run->block != b ||
        run->page + run->count != page || page % CHUNK_PAGES == 0) {
        r = run_flush(l);
        run->block = b;
        run->page = page;
    }
    run->iov[run->count++] =
        (struct iovec){ .iov_base = data, .iov_len = TARGET_PAGE_SIZE };
    return r;
}

/* --- huge pages in postcopy --------------------------------------------- */

static void assembly_begin(struct loader *l, struct ram_block *b, uint64_t host)
{
    struct assembly *a = &l->assembly;

    *a = (struct assembly){ .block = b, .host = host };
    a->dropped = !place_claim(l->d, b, host);
    a->at = a->dropped ? l->scratch : place_huge_at(l->d, b, host, l->scratch);
}

/* What is under the assembly holds old bytes that a zero page must clear. */
static bool assembly_is_stale(const struct loader *l)
{
    const struct assembly *a = &l->assembly;

    return a->at == l->scratch || bitmap_test(&a->block->populated, a->host);
}

static struct result assembly_finish(struct loader *l)
{
    struct assembly a = l->assembly;

    l->assembly.block = NULL;
    if (a.dropped) {
        return result_ok();
    }
    return a.data ? place_huge(l->d, a.block, a.host, a.at) :
                    place_zero(l->d, a.block, a.host);
}

/* `data` NULL: a zero page. */
static struct result assembly_add(struct loader *l, struct ram_block *b,
                                  uint64_t page, const uint8_t *data)
{
    struct assembly *a = &l->assembly;
    uint64_t host = page >> block_pages_bits(b);
    uint64_t within = (page << TARGET_PAGE_BITS) & (b->page_size - 1);

    if (!a->block) {
        assembly_begin(l, b, host);
    } else if (a->block != b || a->host != host) {
        return bad_stream(l, "huge page interrupted by another one",
                          page << TARGET_PAGE_BITS);
    }
    if (data) {
        /* On a fresh page the zero pages before this one were left out. */
        memcpy(a->at + within, data, TARGET_PAGE_SIZE);
        a->data = true;
        if (a->at != l->scratch) {
            /* From here on old bytes are under it, also if it is cut off. */
            bitmap_test_and_set(&b->populated, host);
        }
    } else if (assembly_is_stale(l)) {
        memset(a->at + within, 0, TARGET_PAGE_SIZE);
    }
    if (++a->count == block_pages_per_host(b)) {
        return assembly_finish(l);
    }
    return result_ok();
}

/* --- records -------------------------------------------------------------- */

static struct result zero_page(struct loader *l, struct ram_block *b,
                               uint64_t page)
{
    struct result r = run_flush(l);

    if (!RESULT_IS_OK(r)) {
        return r;
    }
    if (!in_postcopy(l)) {
        return place_early_zero(l->d, b, page);
    }
    return place_claim(l->d, b, page) ? place_zero(l->d, b, page) : r;
}

static void count_page(struct loader *l, bool zero)
{
    struct destination_stats *stats = &l->d->stats;

    if (zero) {
        STATS_ADD(stats->zero_pages, 1);
    }
    if (!in_postcopy(l)) {
        STATS_ADD(stats->precopy_pages, 1);
        return;
    }
    STATS_ADD(stats->postcopy_pages, 1);
    if (l->preempt) {
        STATS_ADD(stats->preempt_pages, 1);
    }
}

/* `data` points into the channel's buffer and is used before the next fill. */
static struct result take_page(struct loader *l, const struct wire_record *rec,
                               uint8_t *data)
{
    uint64_t page = rec->offset >> TARGET_PAGE_BITS;

    count_page(l, !data);
    if (block_is_huge(rec->block) && in_postcopy(l)) {
        struct result r = run_flush(l);

        return RESULT_IS_OK(r) ? assembly_add(l, rec->block, page, data) : r;
    }
    return data ? run_add(l, rec->block, page, data) :
                  zero_page(l, rec->block, page);
}

/* More bytes are wanted: what is buffered must be placed before they move. */
static struct result more(struct loader *l, size_t want)
{
    struct result r = run_flush(l);

    return RESULT_IS_OK(r) ? channel_fill(l->channel, want) : r;
}

/*
 * One record. `*end` is set when it was EOS. A cut record leaves nothing
 * behind: its head is read again when the rest is there.
 */
static struct result next_record_untrusted(struct loader *l, bool *end)
{
    struct channel *c = l->channel;
    struct wire_record rec;
    const char *why = "";
    size_t size;

    for (;;) {
        size_t have = channel_buffered(c);
        enum wire_status status = wire_get_record_untrusted(
            c->buffer + c->start, have, l->d->ram, &l->last, &rec, &why);
        struct result r;

        if (status == WIRE_BAD) {
            return bad_stream(l, why, rec.offset | rec.flags);
        }
        size = rec.length;
        if (status == WIRE_OK && rec.flags & RAM_SAVE_FLAG_PAGE) {
            size += TARGET_PAGE_SIZE;
        }
        if (status == WIRE_OK && have >= size) {
            break;
        }
        r = more(l, status == WIRE_OK ? size : have + 1);
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    *end = rec.flags == RAM_SAVE_FLAG_EOS;
    channel_consume(c, size);
    if (!rec.block) {
        return result_ok();
    }
    return take_page(l, &rec,
                     rec.flags & RAM_SAVE_FLAG_PAGE ?
                         c->buffer + c->start - TARGET_PAGE_SIZE :
                         NULL);
}

struct result load_records(struct loader *l)
{
    bool end = false;

    while (!end) {
        struct result r = next_record_untrusted(l, &end);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        /* Nothing more is here: a page must not wait for the next record. */
        if (!channel_buffered(l->channel)) {
            r = run_flush(l);
            if (!RESULT_IS_OK(r)) {
                return r;
            }
        }
    }
    if (l->assembly.block) {
        return bad_stream(l, "huge page interrupted by the end of a section",
                          l->assembly.host << l->assembly.block->host_bits);
    }
    return run_flush(l);
}

static struct result read_be32(struct loader *l, uint32_t *value)
{
    uint8_t bytes[4];
    struct result r = channel_read(l->channel, bytes, sizeof(bytes));

    *value = wire_get_be32(bytes);
    return r;
}

static struct result check_id(struct loader *l, const char *why)
{
    uint32_t id = 0;
    struct result r = read_be32(l, &id);

    if (RESULT_IS_OK(r) && id != l->section_id) {
        return bad_stream(l, why, id);
    }
    return r;
}

static struct result check_footer(struct loader *l)
{
    uint8_t type = 0;
    struct result r = channel_read(l->channel, &type, 1);

    if (RESULT_IS_OK(r) && type != SECTION_FOOTER) {
        return bad_stream(l, "RAM section without its footer", type);
    }
    return RESULT_IS_OK(r) ? check_id(l, "footer of another section") : r;
}

static struct result load_section(struct loader *l)
{
    struct result r;

    channel_consume(l->channel, 1);
    r = check_id(l, "part of a section that was not started");
    if (RESULT_IS_OK(r)) {
        r = load_records(l);
    }
    return RESULT_IS_OK(r) ? check_footer(l) : r;
}

/* --- discards ------------------------------------------------------------- */

static struct result discard_range(struct loader *l, struct ram_block *b,
                                   uint64_t start, uint64_t length)
{
    uint64_t mask = b->page_size - 1;

    if (start & mask || length & mask || length == 0 || start >= b->length ||
        length > b->length - start) {
        return bad_stream(l, "discard that is not within its RAM block", start);
    }
    return destination_discard(l->d, (uint32_t)(b - l->d->ram->blocks), start,
                               length);
}

/* `length` bytes of a command's payload are buffered. */
static struct result load_discard_untrusted(struct loader *l, size_t length)
{
    const uint8_t *in = l->channel->buffer + l->channel->start;
    const uint8_t *end = in + length;
    struct ram_block *b;

    if (!l->advised || in_postcopy(l)) {
        return bad_stream(l, "discard outside of the switch to postcopy", 0);
    }
    if (length < 3 || in[0] != 0 || length < 3u + in[1] || in[2 + in[1]] != 0) {
        return bad_stream(l, "malformed discard", length);
    }
    b = ram_find(l->d->ram, in + 2, in[1]);
    in += 3 + in[1];
    if (!b) {
        return bad_stream(l, "discard for a RAM block that is not here", 0);
    }
    if (in == end || (end - in) % 16) {
        return bad_stream(l, "discard without whole ranges", length);
    }
    for (; in < end; in += 16) {
        struct result r =
            discard_range(l, b, wire_get_be64(in), wire_get_be64(in + 8));

        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
    l->discards++;
    return result_ok();
}

static struct result load_discard(struct loader *l)
{
    size_t length = wire_get_be16(l->channel->buffer + l->channel->start + 3);
    struct result r;

    channel_consume(l->channel, COMMAND_HEAD);
    r = channel_fill(l->channel, length);
    if (RESULT_IS_OK(r)) {
        r = load_discard_untrusted(l, length);
    }
    channel_consume(l->channel, RESULT_IS_OK(r) ? length : 0);
    return r;
}

/* --- the channels --------------------------------------------------------- */

/*
 * The commands that come in numbers are taken here: discards and the marks of
 * the source's flow control. `*taken` false: it is Python's, and still unread.
 */
static struct result load_command(struct loader *l, bool *taken)
{
    struct channel *c = l->channel;
    struct result r = channel_fill(c, COMMAND_HEAD);
    const uint8_t *in;
    uint32_t ping;

    *taken = false;
    if (!RESULT_IS_OK(r)) {
        return r;
    }
    switch (wire_get_be16(c->buffer + c->start + 1)) {
    case COMMAND_RAM_DISCARD:
        *taken = true;
        return load_discard(l);
    case COMMAND_PING:
        r = channel_fill(c, WIRE_PING_LENGTH);
        in = c->buffer + c->start;
        ping = wire_get_be32(in + COMMAND_HEAD);
        *taken = RESULT_IS_OK(r) && in_postcopy(l) && wire_is_mark(ping) &&
                 wire_get_be16(in + 3) == WIRE_PING_LENGTH - COMMAND_HEAD;
        if (*taken) {
            channel_consume(c, WIRE_PING_LENGTH);
            return rpath_pong(&l->d->rpath, ping);
        }
        return r;
    default:
        return r;
    }
}

struct result load_main(struct loader *l)
{
    for (;;) {
        bool taken = false;
        struct result r = channel_fill(l->channel, 1);

        if (!RESULT_IS_OK(r)) {
            return r;
        }
        l->next = l->channel->buffer[l->channel->start];
        if (l->next == SECTION_COMMAND) {
            r = load_command(l, &taken);
            if (!RESULT_IS_OK(r) || !taken) {
                return r;
            }
        } else if (l->next == SECTION_PART || l->next == SECTION_END) {
            l->begun = true;
            l->ended = l->next == SECTION_END;
            r = load_section(l);
        } else {
            return r;
        }
        if (!RESULT_IS_OK(r)) {
            return r;
        }
    }
}

struct result load_preempt(struct loader *l)
{
    struct result r;

    turn_take(TURN_URGENT);
    r = load_records(l);
    turn_take(TURN_USUAL);
    return r;
}
