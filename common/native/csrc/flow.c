#include "flow.h"

#include <string.h>

/* The window is followed in steps of this part of it. */
#define MARKS_PER_WINDOW 4

static uint64_t first_window(const struct flow *f)
{
    return f->least > FLOW_WINDOW_FIRST ? f->least : FLOW_WINDOW_FIRST;
}

void flow_open(struct flow *f, uint64_t unit)
{
    *f = (struct flow){ .least = FLOW_WINDOW_MIN };
    /* One on its way while another is taken. */
    if (2 * unit > f->least) {
        f->least = 2 * unit;
    }
    f->window = first_window(f);
    pthread_mutex_init(&f->mutex, NULL);
}

void flow_close(struct flow *f)
{
    pthread_mutex_destroy(&f->mutex);
}

void flow_restart(struct flow *f)
{
    pthread_mutex_lock(&f->mutex);
    f->window = first_window(f);
    f->taken = f->sent;
    f->base_ns = 0;
    f->mib_ns = 0;
    memset(f->probes_ns, 0, sizeof(f->probes_ns));
    f->probe_at_ns = 0;
    /* Answers to the marks of the old connection are none to new ones. */
    f->next += FLOW_MARKS;
    f->answered = f->next;
    f->answers = 0;
    pthread_mutex_unlock(&f->mutex);
}

static struct flow_mark *mark(struct flow *f, uint32_t number)
{
    return &f->marks[number % FLOW_MARKS];
}

static uint32_t marks_on_their_way(const struct flow *f)
{
    return f->next - f->answered;
}

static uint32_t put_mark_locked(struct flow *f, uint64_t now_ns, bool alone)
{
    *mark(f, f->next) = (struct flow_mark){
        .sent = f->sent,
        .ahead = f->sent - f->taken,
        .at_ns = now_ns,
        .alone = alone,
    };
    return f->next++;
}

enum flow_turn flow_turn(struct flow *f, uint64_t now_ns)
{
    enum flow_turn turn = FLOW_SEND;

    pthread_mutex_lock(&f->mutex);
    if (now_ns >= f->probe_at_ns) {
        turn = marks_on_their_way(f) ? FLOW_WAIT : FLOW_PROBE;
    } else if (marks_on_their_way(f) && f->sent - f->taken >= f->window) {
        f->was_full = true;
        turn = FLOW_WAIT;
    }
    pthread_mutex_unlock(&f->mutex);
    return turn;
}

static bool mark_is_due_locked(struct flow *f)
{
    uint64_t before =
        marks_on_their_way(f) ? mark(f, f->next - 1)->sent : f->taken;

    return marks_on_their_way(f) < FLOW_MARKS &&
           f->sent - before >= f->window / MARKS_PER_WINDOW;
}

bool flow_send(struct flow *f, uint64_t bytes, uint64_t now_ns,
               uint32_t *number)
{
    bool due;

    pthread_mutex_lock(&f->mutex);
    f->sent += bytes;
    due = mark_is_due_locked(f);
    if (due) {
        *number = put_mark_locked(f, now_ns, false);
    }
    pthread_mutex_unlock(&f->mutex);
    return due;
}

uint32_t flow_probe(struct flow *f, uint64_t now_ns)
{
    uint32_t number;

    pthread_mutex_lock(&f->mutex);
    /* Behind what no mark followed yet it only makes sure that that arrives. */
    number = put_mark_locked(f, now_ns, f->sent == f->taken);
    pthread_mutex_unlock(&f->mutex);
    return number;
}

uint64_t flow_piece(struct flow *f)
{
    return flow_window(f) / MARKS_PER_WINDOW;
}

uint64_t flow_bytes_in(struct flow *f, uint64_t ns)
{
    unsigned __int128 bytes = 0;

    pthread_mutex_lock(&f->mutex);
    if (f->base_ns) {
        bytes = (unsigned __int128)f->window * ns;
        bytes /= f->base_ns + FLOW_QUEUE_NS;
    }
    pthread_mutex_unlock(&f->mutex);
    return (uint64_t)bytes;
}

static uint64_t shortest_recent(const struct flow *f)
{
    uint64_t shortest = f->recent_ns[0];

    for (unsigned i = 1; i < FLOW_RECENT; i++) {
        if (f->recent_ns[i] < shortest) {
            shortest = f->recent_ns[i];
        }
    }
    return shortest;
}

/*
 * At most to twice or half of what it was, and within the bounds; to twice as
 * long as there is next to no queue. Who sends less than it might learns
 * nothing about more.
 */
static uint64_t scaled(const struct flow *f, uint64_t took_ns)
{
    uint64_t wanted_ns = f->base_ns + FLOW_QUEUE_NS;
    uint64_t window = f->window;

    if (wanted_ns >= took_ns && !f->was_full) {
        return window;
    }
    if (took_ns - f->base_ns < FLOW_QUEUE_NS / 2) {
        window *= 2;
    } else if (2 * wanted_ns <= took_ns) {
        window /= 2;
    } else {
        window = (uint64_t)((unsigned __int128)window * wanted_ns / took_ns);
    }
    if (window < f->least) {
        return f->least;
    }
    return window < FLOW_WINDOW_MAX ? window : FLOW_WINDOW_MAX;
}

static void take_probe_locked(struct flow *f, uint64_t took_ns, uint64_t now_ns)
{
    uint64_t pause = FLOW_PROBE_BASES * took_ns;

    f->probes_ns[f->probes++ % FLOW_PROBES] = took_ns;
    f->base_ns = took_ns;
    for (unsigned i = 0; i < FLOW_PROBES; i++) {
        if (f->probes_ns[i] && f->probes_ns[i] < f->base_ns) {
            f->base_ns = f->probes_ns[i];
        }
    }
    f->probe_at_ns = now_ns + (pause > FLOW_PROBE_NS ? pause : FLOW_PROBE_NS);
    f->answers = 0;
}

/*
 * Once the last few answers are all to what was sent under this window. A base
 * that an answer with a queue in front of it undercuts by far was never one:
 * measure it again now.
 */
static void follow_locked(struct flow *f, uint64_t took_ns, uint64_t now_ns)
{
    f->recent_ns[f->answers++ % FLOW_RECENT] = took_ns;
    if (took_ns < f->base_ns / 2) {
        f->probe_at_ns = now_ns;
    }
    if (took_ns < f->base_ns) {
        f->base_ns = took_ns;
    }
    if (f->answers == FLOW_RECENT) {
        f->window = scaled(f, shortest_recent(f));
        f->answers = 0;
        f->was_full = false;
    }
}

/* A thread that was late makes a link look slow; so that is believed slowly. */
static void follow_link_locked(struct flow *f, uint64_t ahead, uint64_t took_ns)
{
    uint64_t queued = took_ns > f->base_ns ? took_ns - f->base_ns : 0;
    uint64_t mib_ns;

    if (!ahead) {
        return;
    }
    mib_ns = (uint64_t)(((unsigned __int128)queued << 20) / ahead);
    if (f->mib_ns && mib_ns > f->mib_ns) {
        mib_ns = f->mib_ns + (mib_ns - f->mib_ns) / FLOW_RECENT;
    }
    f->mib_ns = mib_ns ? mib_ns : 1;
}

bool flow_answer_untrusted(struct flow *f, uint32_t low, uint64_t now_ns)
{
    uint32_t number;
    bool known;

    pthread_mutex_lock(&f->mutex);
    number = f->answered + ((low - f->answered) & 0xffff);
    known = number - f->answered < marks_on_their_way(f);
    if (known) {
        const struct flow_mark *m = mark(f, number);
        uint64_t took = now_ns > m->at_ns ? now_ns - m->at_ns : 1;

        f->taken = m->sent;
        f->answered = number + 1;
        if (m->alone) {
            take_probe_locked(f, took, now_ns);
        } else {
            follow_locked(f, took, now_ns);
            follow_link_locked(f, m->ahead, took);
        }
    }
    pthread_mutex_unlock(&f->mutex);
    return known;
}

uint64_t flow_window(struct flow *f)
{
    uint64_t window;

    pthread_mutex_lock(&f->mutex);
    window = f->window;
    pthread_mutex_unlock(&f->mutex);
    return window;
}

uint64_t flow_link_ns(struct flow *f, uint64_t bytes)
{
    unsigned __int128 ns;

    pthread_mutex_lock(&f->mutex);
    ns = (unsigned __int128)f->mib_ns * bytes >> 20;
    pthread_mutex_unlock(&f->mutex);
    return (uint64_t)ns;
}

uint64_t flow_base_ns(struct flow *f)
{
    uint64_t ns;

    pthread_mutex_lock(&f->mutex);
    ns = f->base_ns;
    pthread_mutex_unlock(&f->mutex);
    return ns;
}
