"""Startup code and memory map for the Cortex-M boards that QEMU has, to run an artefact without an operating system."""

from __future__ import annotations

__all__ = ["BOARDS", "linker_script", "startup_source"]

BOARDS = {
    "cortex-m4": ("mps2-an386", 0x00000000, 0x20000000),
    "cortex-m7": ("mps2-an500", 0x00000000, 0x20000000),
    "cortex-m33": ("mps2-an505", 0x10000000, 0x38000000),
    "cortex-m55": ("mps3-an547", 0x00000000, 0x20000000),
}
"""By target: QEMU's name of a board, and where code and data are in its memory."""


def linker_script(code: int, data: int) -> str:
    """Write the linker script of a board."""
    return f"""\
MEMORY {{
  FLASH (rx) : ORIGIN = {code:#x}, LENGTH = 512K
  RAM (rwx) : ORIGIN = {data:#x}, LENGTH = 256K
}}
ENTRY(start)
SECTIONS {{
  .text : {{ KEEP(*(.vectors)) *(.text*) *(.rodata*) }} > FLASH
  .ARM.exidx : {{ *(.ARM.exidx*) }} > FLASH
  .data : {{ *(.data*) }} > RAM AT > FLASH
  .bss (NOLOAD) : {{ bss_start = .; *(.bss*) *(COMMON) . = ALIGN(8); bss_end = .; }} > RAM
  stack_top = ORIGIN(RAM) + LENGTH(RAM);
}}
"""


def startup_source(prefix: str) -> str:
    """Write the startup code: it switches the FPU on, runs the selftest, and tells the debugger its result."""
    return f"""\
extern int {prefix}_selftest(void);
extern unsigned int bss_start[], bss_end[], stack_top[];
void start(void);

__attribute__((section(".vectors"), used)) static void *const vectors[16] = {{stack_top, (void *)start}};

static void leave(unsigned int status)
{{
    /* Semihosting's SYS_EXIT_EXTENDED: ADP_Stopped_ApplicationExit, and a status. */
    unsigned int block[2] = {{0x20026, status}};
    register unsigned int operation __asm__("r0") = 0x20;
    register unsigned int *parameter __asm__("r1") = block;
    __asm__ volatile("bkpt 0xab" : : "r"(operation), "r"(parameter) : "memory");
    for (;;)
        ;
}}

void start(void)
{{
    unsigned int *word;
    *(volatile unsigned int *)0xe000ed88 |= 0xfu << 20; /* CPACR: the FPU's two coprocessors */
    __asm__ volatile("dsb\\n\\tisb" : : : "memory");
    for (word = bss_start; word < bss_end; word++)
        *word = 0;
    int different = {prefix}_selftest();
    leave(different < 0 || different > 99 ? 99 : (unsigned int)different);
}}
"""
