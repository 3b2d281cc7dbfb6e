"""The parts of the C file that are the same for every stream."""

from __future__ import annotations

from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import DType
from fusecell.compiler.ir.storage import Storage
from fusecell.exporting.c_source.functions import KEYWORDS, function_name

__all__ = ["FIXED_PARTS", "REDUCTIONS", "RESERVED", "STORED_NUMBERS", "reduction_function"]

FIXED_PARTS = """\
#include <math.h>
#include <stdint.h>

/* Each multiply-add is written where it is one: the compiler must not make more of them. GCC ignores the pragma, and
   contracts unless it is called with -std=c99 or -ffp-contract=off. */
#if !defined(__GNUC__) || defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

/* a * b + c, rounded once. Without an instruction for it (GCC and Clang: -mfma, or -march=x86-64-v3) it is a slow call
   of the C library: -D@P@_FMA(a,b,c)=((a)*(b)+(c)) is quick there, with other last bits. */
#ifdef @P@_FMA
#define FMA(a, b, c) @P@_FMA(a, b, c)
#else
#define FMA(a, b, c) @FMA@(a, b, c)
#endif

#if defined(__GNUC__)
#define RESTRICT __restrict__
#define INLINE __inline__ __attribute__((always_inline, unused))
#define NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define RESTRICT __restrict
#define INLINE __forceinline
#define NOINLINE __declspec(noinline)
#else
#define RESTRICT restrict
#define INLINE inline
#define NOINLINE
#endif

/* Denormal numbers count as zero, as in the stream, where this file knows how to tell the machine. */
#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
typedef unsigned int denormal_mode;
static denormal_mode flush_denormals(void)
{
    const denormal_mode mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
}
static void restore_denormals(denormal_mode mode) { _mm_setcsr(mode); }
#elif defined(__GNUC__) && defined(__aarch64__)
typedef uint64_t denormal_mode;
static denormal_mode flush_denormals(void)
{
    denormal_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (UINT64_C(1) << 24)) : "memory");
    return mode;
}
static void restore_denormals(denormal_mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#elif defined(__GNUC__) && defined(__arm__) && defined(__ARM_FP)
typedef uint32_t denormal_mode;
static denormal_mode flush_denormals(void)
{
    denormal_mode mode;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(mode));
    __asm__ volatile("vmsr fpscr, %0" : : "r"(mode | (UINT32_C(1) << 24)) : "memory");
    return mode;
}
static void restore_denormals(denormal_mode mode) { __asm__ volatile("vmsr fpscr, %0" : : "r"(mode) : "memory"); }
#else
typedef int denormal_mode;
static denormal_mode flush_denormals(void) { return 0; }
static void restore_denormals(denormal_mode mode) { (void)mode; }
#endif

/* The bits of numbers, and numbers of bits. */
static INLINE uint32_t bits_f32(float number)
{
    union { float number; uint32_t bits; } both;
    both.number = number;
    return both.bits;
}
static INLINE float number_f32(uint32_t bits)
{
    union { float number; uint32_t bits; } both;
    both.bits = bits;
    return both.number;
}
static INLINE uint64_t bits_f64(double number)
{
    union { double number; uint64_t bits; } both;
    both.number = number;
    return both.bits;
}
static INLINE double number_f64(uint64_t bits)
{
    union { double number; uint64_t bits; } both;
    both.bits = bits;
    return both.number;
}
"""

STORED_NUMBERS = {
    Storage.BF16: """\
/* A bfloat16 number: the upper half of a float. */
static INLINE float number_bf16(uint16_t bits) { return number_f32((uint32_t)bits << 16); }
""",
    Storage.F16: """\
/* A float16 number. Those without an exponent are multiples of 2^-24. */
static INLINE float number_f16(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
    const uint32_t normal = ((uint32_t)(bits & 0x7fffu) << 13) + ((uint32_t)112 << 23);
    const uint32_t small = bits_f32((float)(bits & 0x3ff) * 5.9604644775390625e-08f);
    return number_f32(sign | ((bits & 0x7c00u) != 0 ? normal : small));
}
""",
    Storage.I8: "",
    Storage.I8_I8: "",
}
"""The functions that make floats of stored weights."""
_OWN = """
row col lane block count k a b memory inputs outputs input output stream state steps mode t FMA RESTRICT INLINE NOINLINE
NAN INFINITY unix linux I line place first total step other own before equal pick at one most found_at candidate partial
joined position reduce_sum reduce_prod reduce_amax reduce_amin bits_f32 bits_f64 number_f32 number_f64 number_bf16
number_f16
initial_state run_cells
"""
RESERVED = KEYWORDS | frozenset(_OWN.split()) | {f"{letter}{number}" for letter in "ik" for number in range(24)}
"""Names that the user's values must not have: C's words, and those of the file's own loops."""


_JOINED = f"""\
static real joined(real *partial)
{{
    int lane, width;
    for (width = {LANES // 2}; width > 0; width /= 2)
        for (lane = 0; lane < width; lane++)
            partial[lane] = partial[lane] + partial[lane + width];
    return partial[0];
}}
"""
_POSITION = """\
/* A position as an integer from 0 below count, whatever the number is. */
static int position(real number, int count)
{
    if (!(number > 0))
        return 0;
    return number < (real)(count - 1) ? (int)number : count - 1;
}
"""
REDUCTIONS = ("sum", "prod", "amax", "amin", "partial sums", "position")
"""What `reduction_function` writes."""


def reduction_function(op: str, dtype: DType, real: str) -> str:
    """Write a reduction: sixteen partial results on every machine, joined in one order, so that bits are the same."""
    if op == "partial sums":
        return _JOINED.replace("real", real)
    if op == "position":
        return _POSITION.replace("real", real)
    identity = {"sum": "0", "prod": "1", "amax": "-INFINITY", "amin": "INFINITY"}[op]

    def combined(a: str, b: str) -> str:
        if op in ("sum", "prod"):
            return f"{a} {'+' if op == 'sum' else '*'} {b}"
        return f"{function_name('maximum' if op == 'amax' else 'minimum', dtype)}({a}, {b})"

    return f"""\
static {real} reduce_{op}(const {real} *values, int count, int stride)
{{
    {real} partial[{LANES}];
    int start, lane, width;
    for (lane = 0; lane < {LANES}; lane++)
        partial[lane] = {identity};
    for (start = 0; start + {LANES} <= count; start += {LANES})
        for (lane = 0; lane < {LANES}; lane++)
            partial[lane] = {combined("partial[lane]", "values[(start + lane) * stride]")};
    for (lane = 0; lane < count - start; lane++)
        partial[lane] = {combined("partial[lane]", "values[(start + lane) * stride]")};
    for (width = {LANES // 2}; width > 0; width /= 2)
        for (lane = 0; lane < width; lane++)
            partial[lane] = {combined("partial[lane]", "partial[lane + width]")};
    return partial[0];
}}
"""
