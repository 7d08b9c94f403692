/*
 * From the PVH entry (32-bit, no paging) to guest_main() in 64-bit mode.
 *
 * The guest proper runs at privilege level 3 with everything mapped for the
 * user: some nested hypervisors run level 3 at full speed and emulate level 0
 * instruction by instruction. They also lose the I/O privilege level on the
 * way, so it is the permission map of a task state segment that opens the
 * ports. Only halt_gate below enables interrupts, and the interrupt table has
 * no gates for other exceptions: one is a triple fault, which the VMM reports.
 *
 * The first vCPU starts at pvh_entry with the start info in ebx. It copies the
 * bytes from ap_start to ap_end to AP_PAGE, where the other vCPUs start in
 * 16-bit mode; each draws its number.
 */
#include "boot.h"

#define CODE32 0x08          /* selectors, see gdt */
#define CODE64 0x10
#define DATA 0x18
#define USER_CODE (0x20 | 3)
#define USER_DATA (0x28 | 3)
#define TASKS 0x30

#define UNDEFINED_VECTOR 6
#define INTERRUPT_GATE 0x8e00

#define TASK_PORTS 0x1000    /* ports in a task state segment */
#define TASK_SIZE (104 + TASK_PORTS / 8 + 1)
#define TASK_STACK 4         /* of level 0 */
#define LEVEL0_STACK 1024    /* the lowest bytes of a vCPU's stack */

#define CR0_PE 0x1
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100
#define FLAGS 0x2

#define PRESENT_WRITE_USER 0x7
#define HUGE 0x80

        .section .note.pvh, "a", @note
        .balign 4
        .long 4
        .long 8
        .long 18                        /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .quad pvh_entry

        .text
        .code32
        .globl pvh_entry
pvh_entry:
        cli
        movl %ebx, %edi
        xorl %esi, %esi
        jmp to_long_mode

/* Another vCPU, 32-bit, flat segments. */
ap_entry32:
        movl $DATA, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $1, %esi
        lock xaddl %esi, next_number
        cmpl $GUEST_VCPUS_MAX, %esi
        jae surplus
        xorl %edi, %edi
        jmp to_long_mode
surplus:
        hlt
        jmp surplus

/* edi: start info, or 0; esi: number of this vCPU. Both survive. */
to_long_mode:
        lgdt gdt_pointer
        movl $CR4_PAE, %eax
        movl %eax, %cr4
        movl $page_map, %eax
        movl %eax, %cr3
        movl $MSR_EFER, %ecx
        rdmsr
        orl $EFER_LME, %eax
        wrmsr
        movl %cr0, %eax
        orl $(CR0_PG | CR0_PE), %eax
        movl %eax, %cr0
        ljmp $CODE64, $long_mode

        .code64
long_mode:
        movl $DATA, %eax
        movl %eax, %ss
        lidt idt_pointer
        /* Stack of this vCPU: the stacks lie one behind the other. */
        leal 1(%esi), %eax
        imull $GUEST_STACK, %eax
        addl $stacks, %eax
        movl %eax, %esp
        pushq $USER_DATA
        pushq %rax
        pushq $FLAGS
        pushq $USER_CODE
        pushq $user_mode
        /* The TSS of this vCPU, and the address in its descriptor. */
        imull $TASK_SIZE, %esi, %ecx
        addl $tasks, %ecx
        subl $(GUEST_STACK - LEVEL0_STACK), %eax
        movl %eax, TASK_STACK(%ecx)
        movl %esi, %edx
        shll $4, %edx
        addl $TASKS, %edx
        movw %cx, gdt + 2(%edx)
        shrl $16, %ecx
        movb %cl, gdt + 4(%edx)
        movb %ch, gdt + 7(%edx)
        ltr %dx
        iretq

user_mode:
        movl $USER_DATA, %eax
        movl %eax, %ds
        movl %eax, %es
        xorl %ebp, %ebp
        call guest_main
        ud2

/*
 * ud2: rest for eax ticks of the local APIC's timer. The hypervisors that
 * emulate level 0 deliver this exception there, but neither int nor syscall.
 * They also run level 3 with interrupts enabled, so the timer starts here,
 * where they are not: its interrupt ends the halt and nothing else.
 */
        .globl halt_gate, timer_gate
halt_gate:
        addq $2, (%rsp)                 /* behind the instruction */
        movabsl %eax, APIC_BASE + APIC_TIMER_COUNT
        sti
        hlt
        cli
        iretq

timer_gate:
        pushq %rax
        xorl %eax, %eax
        movabsl %eax, APIC_BASE + APIC_INTERRUPT_END
        popq %rax
        iretq

/* Runs at AP_PAGE, reached with cs = AP_PAGE >> 4. */
        .code16
        .globl ap_start, ap_end
ap_start:
        cli
        lgdtl %cs:(ap_gdt_pointer - ap_start)
        movl %cr0, %eax
        orb $CR0_PE, %al
        movl %eax, %cr0
        ljmpl $CODE32, $ap_entry32
        .balign 4
ap_gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt
ap_end:

        .data
        .balign 8
gdt:
        .quad 0
        .quad 0x00cf9b000000ffff        /* CODE32 */
        .quad 0x00af9b000000ffff        /* CODE64 */
        .quad 0x00cf93000000ffff        /* DATA */
        .quad 0x00affb000000ffff        /* USER_CODE */
        .quad 0x00cff3000000ffff        /* USER_DATA */
        .rept GUEST_VCPUS_MAX           /* TASKS; the address comes later */
        .quad 0x0000890000000000 + TASK_SIZE - 1
        .quad 0
        .endr
gdt_end:
gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt

/* An interrupt table with two gates; both leave interrupts disabled. */
        .balign 8
idt:
        .fill UNDEFINED_VECTOR * 2, 8, 0
        .word halt_gate_low, CODE64, INTERRUPT_GATE, halt_gate_high
        .quad 0
        .fill (TIMER_VECTOR - UNDEFINED_VECTOR - 1) * 2, 8, 0
        .word timer_gate_low, CODE64, INTERRUPT_GATE, timer_gate_high
        .quad 0
idt_end:
idt_pointer:
        .word idt_end - idt - 1
        .quad idt

/*
 * Task state segments, for their permission maps, which open all ports below
 * 0x1000, and for the stack that a gate changes to.
 */
        .balign 8
tasks:
        .rept GUEST_VCPUS_MAX
        .fill 102, 1, 0
        .word 104                       /* where the map is */
        .fill TASK_PORTS / 8, 1, 0
        .byte 0xff
        .endr

        .balign 4
        .globl next_number
next_number:
        .long 1

/*
 * The first 4 GiB lie at their own addresses, in pages of 2 MiB; the window on
 * RAM (see boot.h) is filled in by guest_main().
 */
        .balign 4096
page_map:
        .quad low_directories + PRESENT_WRITE_USER
        .quad window_directories + PRESENT_WRITE_USER
        .fill 510, 8, 0
low_directories:
        .set gib, 0
        .rept 4
        .quad low_pages + (gib << 12) + PRESENT_WRITE_USER
        .set gib, gib + 1
        .endr
        .fill 508, 8, 0
low_pages:
        .set page, 0
        .rept 4 * 512
        .quad (page << 21) + PRESENT_WRITE_USER + HUGE
        .set page, page + 1
        .endr

        .bss
        .balign 4096
        .globl window_directories, window_pages
window_directories:
        .skip 4096
window_pages:
        .skip GUEST_WINDOW_GIB * 4096
stacks:
        .skip GUEST_VCPUS_MAX * GUEST_STACK

        .section .note.GNU-stack, "", @progbits
