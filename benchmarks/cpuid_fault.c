/* Answer CPUID without the features above a level of CPUs, for every library of this process and all its threads.

   Linux lets a process on x86-64 have its CPUID instructions fault (arch_prctl(2), ARCH_SET_CPUID), where CPU and
   hypervisor can. The handler of that fault runs the instruction for the library that asked, and clears the bits of
   what it shall not see. What a library can't see it doesn't use: kernels are chosen as on a CPU that hasn't got it. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, CPUID_BYTES = 2 };

struct registers {
    uint32_t eax, ebx, ecx, edx;
};

/* Bits that are cleared. Features that end in one of a level's names are that level's by the psABI of x86-64. */
static struct registers cleared_of_leaf_1, cleared_of_leaf_7, cleared_of_leaf_7_1;
static struct sigaction action_before;

static void let_cpuid_run(long allowed) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static struct registers answer(uint32_t leaf, uint32_t subleaf) {
    struct registers seen, cleared = {0, 0, 0, 0};
    let_cpuid_run(1);
    __cpuid_count(leaf, subleaf, seen.eax, seen.ebx, seen.ecx, seen.edx);
    let_cpuid_run(0);
    if (leaf == 1) cleared = cleared_of_leaf_1;
    if (leaf == 7 && subleaf == 0) cleared = cleared_of_leaf_7;
    if (leaf == 7 && subleaf == 1) cleared = cleared_of_leaf_7_1;
    seen.eax &= ~cleared.eax;
    seen.ebx &= ~cleared.ebx;
    seen.ecx &= ~cleared.ecx;
    seen.edx &= ~cleared.edx;
    return seen;
}

static void on_fault(int signal_number, siginfo_t *information, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    (void)signal_number;
    /* CPUID raises a general protection fault, which has no address; any other fault is somebody's mistake. */
    if (information->si_addr != 0 || code == 0 || code[0] != 0x0f || code[1] != 0xa2) {
        sigaction(SIGSEGV, &action_before, 0); /* which the same instruction meets when it is run again */
        return;
    }
    struct registers seen = answer((uint32_t)registers[REG_RAX], (uint32_t)registers[REG_RCX]);
    registers[REG_RAX] = seen.eax;
    registers[REG_RBX] = seen.ebx;
    registers[REG_RCX] = seen.ecx;
    registers[REG_RDX] = seen.edx;
    registers[REG_RIP] += CPUID_BYTES;
}

/* Hide AVX-512, AMX and AVX10, and if ``avx`` isn't set AVX, AVX2, FMA, F16C and BMI as well. Return 0, or errno. */
int hold_cpuid(int avx) {
    /* AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL */
    cleared_of_leaf_7.ebx = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
    /* AVX512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    cleared_of_leaf_7.ecx = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
    /* AVX512 4VNNIW, 4FMAPS, VP2INTERSECT; AMX BF16; AVX512 FP16; AMX TILE, INT8 */
    cleared_of_leaf_7.edx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;
    cleared_of_leaf_7_1.eax = 1u << 5 | 1u << 21;  /* AVX512 BF16, AMX FP16 */
    cleared_of_leaf_7_1.edx = 1u << 8 | 1u << 19;  /* AMX COMPLEX, AVX10 */
    if (!avx) {
        cleared_of_leaf_1.ecx = 1u << 12 | 1u << 28 | 1u << 29;        /* FMA, AVX, F16C */
        cleared_of_leaf_7.ebx |= 1u << 3 | 1u << 5 | 1u << 8;          /* BMI1, AVX2, BMI2 */
        cleared_of_leaf_7.ecx |= 1u << 9 | 1u << 10;                   /* VAES, VPCLMULQDQ */
        cleared_of_leaf_7_1.eax |= 1u << 4 | 1u << 23;                 /* AVX VNNI, AVX IFMA */
        cleared_of_leaf_7_1.edx |= 1u << 4 | 1u << 5 | 1u << 10;       /* AVX VNNI INT8, NE CONVERT, VNNI INT16 */
    }
    struct sigaction action = {0};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGSEGV, &action, &action_before)) return errno;
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        int reason = errno;
        sigaction(SIGSEGV, &action_before, 0);
        return reason;
    }
    return 0;
}
