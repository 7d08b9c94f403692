#include "kernel.h"

#include <elf.h>
#include <string.h>

#define NOTE_PHYS32_ENTRY 18u /* XEN_ELFNOTE_PHYS32_ENTRY */

struct file {
    const uint8_t *bytes;
    size_t length;
};

/* NULL if the range is not in the file. */
static const uint8_t *file_range(struct file f, uint64_t offset, uint64_t size)
{
    if (offset > f.length || size > f.length - offset)
        return NULL;
    return f.bytes + offset;
}

static bool read_header(struct file f, Elf64_Ehdr *h, struct fail *why)
{
    const uint8_t *bytes = file_range(f, 0, sizeof(*h));

    if (!bytes)
        return fail(why, "not an ELF file: too short");
    memcpy(h, bytes, sizeof(*h));
    if (memcmp(h->e_ident, ELFMAG, SELFMAG) != 0)
        return fail(why, "not an ELF file");
    if (h->e_ident[EI_CLASS] != ELFCLASS64 || h->e_machine != EM_X86_64)
        return fail(why, "not a 64-bit x86 ELF file");
    if (h->e_phentsize != sizeof(Elf64_Phdr))
        return fail(why, "program headers of %u bytes", h->e_phentsize);
    return true;
}

static bool add_segment(struct file f, const Elf64_Phdr *p, uint64_t low,
                        uint64_t high, struct kernel *kernel, struct fail *why)
{
    if (p->p_memsz == 0)
        return true;
    if (p->p_filesz > p->p_memsz || !file_range(f, p->p_offset, p->p_filesz))
        return fail(why, "a segment goes past the end of the file");
    if (p->p_paddr < low || p->p_paddr > high || p->p_memsz > high - p->p_paddr)
        return fail(why,
                    "a segment at 0x%llx does not fit the RAM from 0x%llx "
                    "to 0x%llx",
                    (unsigned long long)p->p_paddr, (unsigned long long)low,
                    (unsigned long long)high);
    if (kernel->count == KERNEL_SEGMENTS_MAX)
        return fail(why, "more than %u segments", KERNEL_SEGMENTS_MAX);
    kernel->segments[kernel->count++] =
        (struct kernel_segment){ p->p_offset, p->p_filesz, p->p_paddr,
                                 p->p_memsz };
    return true;
}

static uint64_t align4(uint64_t size)
{
    return (size + 3) & ~3ull;
}

/* Walk the notes in one PT_NOTE segment; sets `entry` if it is there. */
static void read_notes(struct file notes, uint64_t *entry)
{
    uint64_t at = 0;
    const uint8_t *bytes;

    while ((bytes = file_range(notes, at, sizeof(Elf64_Nhdr)))) {
        Elf64_Nhdr h;
        const uint8_t *name, *value;

        memcpy(&h, bytes, sizeof(h));
        at += sizeof(h);
        name = file_range(notes, at, h.n_namesz);
        at += align4(h.n_namesz);
        value = file_range(notes, at, h.n_descsz);
        at += align4(h.n_descsz);
        if (!name || !value)
            return;
        if (h.n_type == NOTE_PHYS32_ENTRY && h.n_namesz == 4 &&
            memcmp(name, "Xen", 4) == 0 &&
            (h.n_descsz == 4 || h.n_descsz == 8)) {
            *entry = 0;
            memcpy(entry, value, h.n_descsz);
        }
    }
}

static bool is_in_segment(const struct kernel *kernel, uint64_t address)
{
    for (size_t i = 0; i < kernel->count; i++) {
        const struct kernel_segment *s = &kernel->segments[i];

        if (address >= s->address && address - s->address < s->file_size)
            return true;
    }
    return false;
}

bool kernel_parse(const void *bytes, size_t length, uint64_t low, uint64_t high,
                  struct kernel *kernel, struct fail *why)
{
    struct file f = { bytes, length };
    uint64_t entry = UINT64_MAX;
    const uint8_t *table;
    Elf64_Ehdr h;

    *kernel = (struct kernel){ 0 };
    if (!read_header(f, &h, why))
        return false;
    table = file_range(f, h.e_phoff, (uint64_t)h.e_phnum * sizeof(Elf64_Phdr));
    if (!table)
        return fail(why, "the program headers are not in the file");
    for (unsigned i = 0; i < h.e_phnum; i++) {
        const uint8_t *notes;
        Elf64_Phdr p;

        memcpy(&p, table + i * sizeof(p), sizeof(p));
        if (p.p_type == PT_LOAD && !add_segment(f, &p, low, high, kernel, why))
            return false;
        notes = file_range(f, p.p_offset, p.p_filesz);
        if (p.p_type == PT_NOTE && notes)
            read_notes((struct file){ notes, p.p_filesz }, &entry);
    }
    if (entry == UINT64_MAX)
        return fail(why, "no PVH entry (the note XEN_ELFNOTE_PHYS32_ENTRY)");
    if (entry > UINT32_MAX || !is_in_segment(kernel, entry))
        return fail(why, "the PVH entry 0x%llx is in no segment",
                    (unsigned long long)entry);
    kernel->entry = (uint32_t)entry;
    return true;
}
