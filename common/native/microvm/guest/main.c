/*
 * The bare test guest: finds its memory, starts the other vCPUs, and runs one
 * worker (workload.c) on each. See entry.S for how it gets here.
 */
#include "boot.h"
#include "ports.h"
#include "pvh.h"
#include "text.h"
#include "workload.h"

#define FOUR_GIB (4ull << 30)
#define TWO_MIB (2ull << 20)
#define PAGE_FLAGS 0x87u /* present, writable, user, 2 MiB */
#define TABLE_FLAGS 0x07u

#define SCRATCH_MARK 0xa5u

#define APIC_MASKED 0x10000u
#define APIC_DIVIDE_BY_1 0xbu
#define APIC_TICKS_PER_US 1000u /* KVM's timer counts nanoseconds */
#define APIC_ENABLE 0x1ffu
#define APIC_INIT_OTHERS 0x000c4500u
#define APIC_START_OTHERS 0x000c4600u
#define AP_WAIT_MS 20000u

#define PIT_HZ 1193182u
#define PIT_TICKS 59659u /* 50 ms */
#define PIT_CHANNEL_2 0x42
#define PIT_COMMAND 0x43
#define PIT_GATE 0x61
#define GUESSED_KHZ 2000000u

extern const uint8_t ap_start[], ap_end[];
extern volatile uint32_t next_number;
extern uint64_t window_directories[512];
extern uint64_t window_pages[GUEST_WINDOW_GIB * 512];

void guest_main(uint32_t start_info, uint32_t number);

/* Written by the first vCPU before `go`, read by the others after it. */
static struct settings settings;
static struct layout layout;
static volatile uint32_t go;
static volatile uint32_t print_lock;

/* Ports */

static void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static void out32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static uint8_t in8(uint16_t port)
{
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static void print(const char *bytes, size_t length)
{
    while (__atomic_exchange_n(&print_lock, 1, __ATOMIC_ACQUIRE))
        __builtin_ia32_pause();
    for (size_t i = 0; i < length; i++) {
        while (!(in8(PORT_SERIAL_LINE_STATUS) & SERIAL_TRANSMITTER_EMPTY))
            __builtin_ia32_pause();
        out8(PORT_SERIAL_DATA, (uint8_t)bytes[i]);
    }
    __atomic_store_n(&print_lock, 0, __ATOMIC_RELEASE);
}

static void say(const char *words)
{
    struct text t = { 0 };

    text_add(&t, words);
    text_add(&t, "\n");
    print(t.bytes, t.length);
}

static bool moved(void)
{
    if (in8(PORT_SERIAL_SCRATCH) == SCRATCH_MARK)
        return false;
    out8(PORT_SERIAL_SCRATCH, SCRATCH_MARK);
    return true;
}

static const struct platform platform = { print, moved };

static _Noreturn void reset(const char *why)
{
    say(why);
    for (;;)
        out8(PORT_RESET, RESET_COMMAND);
}

/* Time */

/* Ticks of the TSC while the interval timer counts down 50 ms. */
static uint64_t calibrate_khz(void)
{
    uint64_t start, ticks;

    out8(PIT_GATE, (uint8_t)((in8(PIT_GATE) & ~2u) | 1u));
    out8(PIT_COMMAND, 0xb0); /* channel 2, both bytes, one shot */
    out8(PIT_CHANNEL_2, PIT_TICKS & 0xff);
    out8(PIT_CHANNEL_2, PIT_TICKS >> 8);
    start = __builtin_ia32_rdtsc();
    do {
        ticks = __builtin_ia32_rdtsc() - start;
    } while (!(in8(PIT_GATE) & 0x20) && ticks < 50ull * 20000000);
    ticks = ticks * PIT_HZ / PIT_TICKS / 1000;
    /* Nobody at the port: the bit was set at once, or never. */
    return ticks > 100000 && ticks < 19000000 ? ticks : GUESSED_KHZ;
}

static void wait_ms(uint64_t ms)
{
    uint64_t start = __builtin_ia32_rdtsc();

    while (__builtin_ia32_rdtsc() - start < ms * settings.tsc_khz)
        __builtin_ia32_pause();
}

/* Memory */

static uint64_t map_window(uint64_t mapped, uint64_t address, uint64_t size)
{
    uint64_t end = (address + size) / TWO_MIB * TWO_MIB;

    while (address < end && mapped / TWO_MIB < GUEST_WINDOW_GIB * 512) {
        window_pages[mapped / TWO_MIB] = address | PAGE_FLAGS;
        address += TWO_MIB;
        mapped += TWO_MIB;
    }
    return mapped;
}

/*
 * The RAM that starts at 0 (with what a PC has below 1 MiB taken for RAM: the
 * guest uses none of it) and the RAM from 4 GiB on. Returns the sum.
 */
static uint64_t find_ram(const struct pvh_start_info *info)
{
    const struct pvh_memory *map = (const void *)(uintptr_t)info->memory_map;
    uint64_t mapped = 0;

    for (unsigned i = 0; i < GUEST_WINDOW_GIB; i++)
        window_directories[i] =
            (uint64_t)(uintptr_t)&window_pages[i * 512] | TABLE_FLAGS;
    for (unsigned i = 0; i < info->memory_map_entries; i++) {
        uint64_t end = map[i].address + map[i].size;

        if (map[i].type == PVH_MEMORY_RAM && map[i].address <= 1u << 20 &&
            end > 1u << 20)
            mapped = map_window(mapped, 0, end);
    }
    for (unsigned i = 0; i < info->memory_map_entries; i++) {
        if (map[i].type == PVH_MEMORY_RAM && map[i].address == FOUR_GIB)
            mapped = map_window(mapped, FOUR_GIB, map[i].size);
    }
    return mapped;
}

/* Other vCPUs */

static void apic_write(uint32_t offset, uint32_t value)
{
    *(volatile uint32_t *)(uintptr_t)(APIC_BASE + offset) = value;
}

static void start_others(void)
{
    volatile uint8_t *page = (volatile uint8_t *)(uintptr_t)AP_PAGE;

    if (settings.vcpus == 1)
        return;
    for (size_t i = 0; i < (size_t)(ap_end - ap_start); i++)
        page[i] = ap_start[i];
    apic_write(APIC_SPURIOUS, APIC_ENABLE);
    apic_write(APIC_COMMAND_LOW, APIC_INIT_OTHERS);
    wait_ms(10);
    apic_write(APIC_COMMAND_LOW, APIC_START_OTHERS | AP_PAGE >> 12);
    for (unsigned ms = 0; next_number < settings.vcpus; ms++) {
        if (ms == AP_WAIT_MS)
            reset("some vCPUs did not start");
        wait_ms(1);
    }
}

/* Rests */

/* Of the interrupts, only the timer's has somebody who takes it. */
static void prepare_halting(void)
{
    apic_write(APIC_SPURIOUS, APIC_ENABLE);
    apic_write(APIC_LINE_0, APIC_MASKED);
    apic_write(APIC_LINE_1, APIC_MASKED);
    apic_write(APIC_TIMER_DIVIDE, APIC_DIVIDE_BY_1);
    apic_write(APIC_TIMER, TIMER_VECTOR);
}

static void halt(uint32_t us)
{
    /* See halt_gate. */
    __asm__ volatile("ud2" : : "a"(us * APIC_TICKS_PER_US) : "memory");
}

static void rest(uint32_t us)
{
    if (settings.halt)
        halt(us);
    else
        out32(PORT_NAP, us);
}

static void say_start(void)
{
    struct text t = { 0 };

    text_add(&t, "test guest: ");
    text_add_number(&t, settings.vcpus);
    text_add(&t, " vCPUs, ");
    text_add_number(&t, layout.area_pages);
    text_add(&t, " pages, tsc ");
    text_add_number(&t, settings.tsc_khz);
    text_add(&t, " kHz\n");
    print(t.bytes, t.length);
}

static void set_up(const struct pvh_start_info *info)
{
    uint64_t ram;

    if (info->magic != PVH_START_MAGIC || info->version < 1)
        reset("no PVH start info with a memory map");
    settings = settings_parse((const char *)(uintptr_t)info->command_line);
    if (settings.tsc_khz == 0)
        settings.tsc_khz = calibrate_khz();
    ram = find_ram(info);
    if (!layout_make(&layout, &settings, ram))
        reset("the memory is too small");
    say_start();
    moved();
    start_others();
    layout_report(&layout, &settings, (uint8_t *)GUEST_WINDOW);
    __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
}

void guest_main(uint32_t start_info, uint32_t number)
{
    struct workload w;

    if (number == 0)
        set_up((const struct pvh_start_info *)(uintptr_t)start_info);
    while (!__atomic_load_n(&go, __ATOMIC_ACQUIRE))
        __builtin_ia32_pause();
    if (settings.halt)
        prepare_halting();
    workload_init(&w, &platform, (uint8_t *)GUEST_WINDOW, number, &settings,
                  &layout);
    for (;;) {
        uint32_t wait = workload_step(&w);

        if (wait > 0)
            rest(wait);
    }
}
