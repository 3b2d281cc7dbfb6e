/* An exported GRU on a bare Cortex-M7: startup code, a hundred steps, and how much stack they took.

   Build and run it, on QEMU's board mps2-an500:

       arm-none-eabi-gcc -mcpu=cortex-m7 -mthumb -mfloat-abi=hard -Os -ffreestanding -nostdlib \
           -T cortex_m7.ld cortex_m7.c gru.o -lgcc -o gru.elf
       qemu-system-arm -M mps2-an500 -nographic -semihosting-config enable=on,target=native -kernel gru.elf */
#include <stdint.h>

#include "gru.h"

#define STEPS 100

extern uint32_t bss_start[], bss_end[], stack_bottom[], stack_top[];
void start(void);

__attribute__((section(".vectors"), used)) static void *const vectors[16] = {stack_top, (void *)start};

/* Semihosting: ask the debugger, here QEMU, for an operation. */
static void ask(uint32_t operation, const void *parameter)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = parameter;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(const char *text)
{
    ask(0x04, text);
}

static void print_number(const char *label, uint32_t value)
{
    char digits[12] = "           ";
    int at = 10;
    digits[11] = 0;
    do
        digits[at--] = (char)('0' + value % 10);
    while ((value /= 10) != 0);
    print(label);
    print(&digits[at + 1]);
    print("\n");
}

static gru_stream stream;
static float input[GRU_INPUT_SIZE], output[GRU_OUTPUT_SIZE];

/* Run the steps; returns a hash of the bits of all outputs (FNV-1a). */
static uint32_t run(void)
{
    uint32_t hash = 2166136261u;
    for (int t = 0; t < STEPS; t++) {
        for (int i = 0; i < GRU_INPUT_SIZE; i++)
            input[i] = (float)((7 * t + 3 * i) % 11 - 5) / 4.0f;
        gru_step(&stream, input, output);
        const unsigned char *bytes = (const unsigned char *)output;
        for (unsigned i = 0; i < sizeof output; i++)
            hash = (hash ^ bytes[i]) * 16777619u;
    }
    return hash;
}

void start(void)
{
    *(volatile uint32_t *)0xe000ed88 |= 0xfu << 20; /* CPACR: switch the FPU on */
    __asm__ volatile("dsb\n\tisb" : : : "memory");
    for (uint32_t *word = bss_start; word < bss_end; word++)
        *word = 0;
    /* Paint the stack below here, to see how deep the steps go. */
    uint32_t *here = (uint32_t *)__builtin_frame_address(0) - 16;
    for (uint32_t *word = stack_bottom; word < here; word++)
        *word = 0x5afe5afe;
    print_number("status ", (uint32_t)gru_init(&stream));
    print_number("hash ", run());
    uint32_t *deepest = stack_bottom;
    while (*deepest == 0x5afe5afe)
        deepest++;
    print_number("stream ", sizeof stream);
    print_number("stack ", (uint32_t)((char *)here - (char *)deepest));
    const uint32_t leave[2] = {0x20026, 0}; /* SYS_EXIT_EXTENDED: the application ended, with status 0 */
    ask(0x20, leave);
    for (;;)
        ;
}
