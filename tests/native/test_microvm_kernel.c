/* microvm's kernel loader: a good file, and every way it can be bad. */
#include "check.h"
#include "kernel.h"

#include <elf.h>
#include <stdlib.h>

#define LOW 0x100000u
#define HIGH 0x800000u

/* One segment, one note: header, program headers, note, 16 bytes of code. */
struct image {
    Elf64_Ehdr header;
    Elf64_Phdr load;
    Elf64_Phdr note;
    struct {
        Elf64_Nhdr header;
        char name[4];
        uint64_t entry;
    } __attribute__((packed)) pvh;
    uint8_t code[16];
};

static struct kernel kernel;
static struct fail why;

static struct image good(void)
{
    struct image image = {
        .header = {
            .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, 1 },
            .e_machine = EM_X86_64,
            .e_phoff = offsetof(struct image, load),
            .e_phentsize = sizeof(Elf64_Phdr),
            .e_phnum = 2,
        },
        .load = {
            .p_type = PT_LOAD,
            .p_offset = offsetof(struct image, code),
            .p_paddr = 0x200000,
            .p_filesz = 16,
            .p_memsz = 4096,
        },
        .note = {
            .p_type = PT_NOTE,
            .p_offset = offsetof(struct image, pvh),
            .p_filesz = sizeof(image.pvh),
        },
        .pvh = {
            .header = { .n_namesz = 4, .n_descsz = 8, .n_type = 18 },
            .name = "Xen",
            .entry = 0x200004,
        },
    };

    return image;
}

static bool parse(const struct image *image)
{
    return kernel_parse(image, sizeof(*image), LOW, HIGH, &kernel, &why);
}

static void test_good(void)
{
    struct image image = good();

    CHECK(parse(&image));
    CHECK_EQ(kernel.entry, 0x200004);
    CHECK_EQ(kernel.count, 1);
    CHECK_EQ(kernel.segments[0].address, 0x200000);
    CHECK_EQ(kernel.segments[0].file_size, 16);
    CHECK_EQ(kernel.segments[0].memory_size, 4096);
}

static void test_short_entry(void)
{
    struct image image = good();

    image.pvh.header.n_descsz = 4;
    image.note.p_filesz -= 4;
    CHECK(parse(&image));
    CHECK_EQ(kernel.entry, 0x200004);
}

static void test_not_elf(void)
{
    struct image image = good();

    image.header.e_ident[0] = 'E';
    CHECK(!parse(&image));
    image = good();
    image.header.e_ident[EI_CLASS] = ELFCLASS32;
    CHECK(!parse(&image));
    image = good();
    image.header.e_machine = EM_AARCH64;
    CHECK(!parse(&image));
}

static void test_bad_table(void)
{
    struct image image = good();

    image.header.e_phoff = UINT64_MAX - 8;
    CHECK(!parse(&image));
    image = good();
    image.header.e_phnum = 0xffff;
    CHECK(!parse(&image));
    image = good();
    image.header.e_phentsize = 32;
    CHECK(!parse(&image));
}

static void test_no_pvh_note(void)
{
    struct image image = good();

    image.pvh.header.n_type = 17;
    CHECK(!parse(&image));
    CHECK(strstr(why.text, "no PVH entry"));
    image = good();
    image.pvh.name[0] = 'Y';
    CHECK(!parse(&image));
    image = good();
    image.pvh.header.n_namesz = UINT32_MAX;
    CHECK(!parse(&image));
    image = good();
    image.pvh.header.n_descsz = UINT32_MAX;
    CHECK(!parse(&image));
    image = good();
    image.note.p_filesz = UINT64_MAX;
    CHECK(!parse(&image));
}

static void test_entry_outside(void)
{
    static const uint64_t entries[] = { 0, 0x1fffff, 0x200010, 0x100200004,
                                        UINT64_MAX };
    struct image image = good();

    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        image.pvh.entry = entries[i];
        CHECK(!parse(&image));
    }
}

static void test_segment_outside_of_ram(void)
{
    struct image image = good();

    image.load.p_paddr = LOW - 1;
    CHECK(!parse(&image));
    image = good();
    image.load.p_memsz = HIGH - 0x200000 + 1;
    CHECK(!parse(&image));
    image = good();
    image.load.p_memsz = UINT64_MAX;
    CHECK(!parse(&image));
    image = good();
    image.load.p_paddr = UINT64_MAX - 8;
    CHECK(!parse(&image));
}

static void test_segment_outside_of_file(void)
{
    struct image image = good();

    image.load.p_filesz = 17;
    CHECK(!parse(&image));
    image = good();
    image.load.p_offset = UINT64_MAX - 8;
    CHECK(!parse(&image));
    image = good();
    image.load.p_filesz = 4097;
    CHECK(!parse(&image));
}

static void test_too_many_segments(void)
{
    size_t count = KERNEL_SEGMENTS_MAX + 1;
    size_t size = sizeof(struct image) + count * sizeof(Elf64_Phdr);
    uint8_t *file = calloc(1, size);
    struct image image = good();

    image.header.e_phoff = sizeof(image);
    image.header.e_phnum = (uint16_t)count;
    memcpy(file, &image, sizeof(image));
    for (size_t i = 0; i < count; i++)
        memcpy(file + sizeof(image) + i * sizeof(Elf64_Phdr), &image.load,
               sizeof(Elf64_Phdr));
    CHECK(!kernel_parse(file, size, LOW, HIGH, &kernel, &why));
    CHECK(strstr(why.text, "segments"));
    free(file);
}

static void test_cut_everywhere(void)
{
    struct image image = good();

    for (size_t cut = 0; cut < sizeof(image); cut++) {
        uint8_t *copy = malloc(cut + !cut);

        memcpy(copy, &image, cut);
        CHECK(!kernel_parse(copy, cut, LOW, HIGH, &kernel, &why));
        free(copy);
    }
}

static void test_any_byte_changed(void)
{
    struct image image = good();
    uint8_t *bytes = (uint8_t *)&image;

    for (size_t at = 0; at < sizeof(image); at++) {
        for (unsigned value = 0; value < 256; value++) {
            uint8_t old = bytes[at];

            bytes[at] = (uint8_t)value;
            parse(&image);
            bytes[at] = old;
        }
    }
}

int main(void)
{
    RUN(test_good);
    RUN(test_short_entry);
    RUN(test_not_elf);
    RUN(test_bad_table);
    RUN(test_no_pvh_note);
    RUN(test_entry_outside);
    RUN(test_segment_outside_of_ram);
    RUN(test_segment_outside_of_file);
    RUN(test_too_many_segments);
    RUN(test_cut_everywhere);
    RUN(test_any_byte_changed);
    return check_status();
}
