"""Multiply-adds rounded once for targets without the instruction, as LLVM text.

LLVM would call the C library's ``fmaf`` for each lane: bare machines and web pages have none, and it is slow.
"""

from __future__ import annotations

import re

from fusecell.compiler.ir.primitives import LANES

__all__ = ["with_soft_fma"]

_N = LANES
_F32, _F64, _I64 = f"<{_N} x float>", f"<{_N} x double>", f"<{_N} x i64>"


def with_soft_fma(text: str) -> str:
    """Replace the vector multiply-adds of a text by calls of functions, and define these."""
    for suffix, definition in (("f32", _FLOAT), ("f64", _DOUBLE)):
        intrinsic = f"@llvm.fma.v{_N}{suffix}"
        if intrinsic in text:
            text = re.sub(rf"^declare .*{re.escape(intrinsic)}\(.*\n", "", text, flags=re.MULTILINE)
            text = text.replace(intrinsic, f"@fma.{suffix}") + definition
    return text + _ROUND_TO_ODD if "@fma." in text else text


# The sum of two numbers and its exact error (Knuth's TwoSum); where the error isn't zero and the last bit is even, the
# neighbour towards the error: round to odd, so that a second rounding, to fewer bits, is as if from the exact sum
# (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57, 2008). An infinite sum
# has a NaN error, and stays.
_ROUND_TO_ODD = f"""
define internal {_F64} @sum.to.odd({_F64} %a, {_F64} %b) alwaysinline nounwind {{
  %s = fadd {_F64} %a, %b
  %b.part = fsub {_F64} %s, %a
  %a.part = fsub {_F64} %s, %b.part
  %b.error = fsub {_F64} %b, %b.part
  %a.error = fsub {_F64} %a, %a.part
  %error = fadd {_F64} %a.error, %b.error
  %inexact = fcmp one {_F64} %error, zeroinitializer
  %bits = bitcast {_F64} %s to {_I64}
  %error.bits = bitcast {_F64} %error to {_I64}
  %last = and {_I64} %bits, splat (i64 1)
  %even = icmp eq {_I64} %last, zeroinitializer
  %moves = and <{_N} x i1> %inexact, %even
  %signs = xor {_I64} %bits, %error.bits
  %towards.zero = icmp slt {_I64} %signs, zeroinitializer
  %direction = select <{_N} x i1> %towards.zero, {_I64} splat (i64 -1), {_I64} splat (i64 1)
  %neighbour = add {_I64} %bits, %direction
  %odd.bits = select <{_N} x i1> %moves, {_I64} %neighbour, {_I64} %bits
  %odd = bitcast {_I64} %odd.bits to {_F64}
  ret {_F64} %odd
}}
"""

# The product of two float32 is exact in float64, and float64 has more than two bits above twice float32's precision.
_FLOAT = f"""
define internal {_F32} @fma.f32({_F32} %a, {_F32} %b, {_F32} %c) noinline nounwind {{
  %a.wide = fpext {_F32} %a to {_F64}
  %b.wide = fpext {_F32} %b to {_F64}
  %c.wide = fpext {_F32} %c to {_F64}
  %product = fmul {_F64} %a.wide, %b.wide
  %sum = call {_F64} @sum.to.odd({_F64} %product, {_F64} %c.wide)
  %result = fptrunc {_F64} %sum to {_F32}
  ret {_F32} %result
}}
"""

_SPLITTER = 2.0**27 + 1


def _two_product() -> str:
    """Write ph + pl = a b exactly, by Dekker's splitting."""
    lines = []
    for x in "ab":
        lines += [
            f"%{x}.scaled = fmul {_F64} %{x}, splat (double {_SPLITTER:e})",
            f"%{x}.rest = fsub {_F64} %{x}.scaled, %{x}",
            f"%{x}.high = fsub {_F64} %{x}.scaled, %{x}.rest",
            f"%{x}.low = fsub {_F64} %{x}, %{x}.high",
        ]
    lines += [
        f"%p.high = fmul {_F64} %a, %b",
        f"%hh = fmul {_F64} %a.high, %b.high",
        f"%e1 = fsub {_F64} %hh, %p.high",
        f"%hl = fmul {_F64} %a.high, %b.low",
        f"%e2 = fadd {_F64} %e1, %hl",
        f"%lh = fmul {_F64} %a.low, %b.high",
        f"%e3 = fadd {_F64} %e2, %lh",
        f"%ll = fmul {_F64} %a.low, %b.low",
        f"%p.low = fadd {_F64} %e3, %ll",
    ]
    return "\n  ".join(lines)


def _two_sum(high: str, low: str, a: str, b: str) -> str:
    """Write high + low = a + b exactly."""
    p = high.strip("%")
    return "\n  ".join(
        [
            f"{high} = fadd {_F64} {a}, {b}",
            f"%{p}.b = fsub {_F64} {high}, {a}",
            f"%{p}.a = fsub {_F64} {high}, %{p}.b",
            f"%{p}.b.error = fsub {_F64} {b}, %{p}.b",
            f"%{p}.a.error = fsub {_F64} {a}, %{p}.a",
            f"{low} = fadd {_F64} %{p}.a.error, %{p}.b.error",
        ]
    )


# Exact but near overflow and underflow, where splitting fails: there it multiplies and adds, which is as exact where
# one factor is a power of two, as in exponentials.
_DOUBLE = f"""
define internal {_F64} @fma.f64({_F64} %a, {_F64} %b, {_F64} %c) noinline nounwind {{
  {_two_product()}
  {_two_sum("%u.high", "%u.low", "%c", "%p.low")}
  {_two_sum("%v.high", "%v.low", "%p.high", "%u.high")}
  %rest = call {_F64} @sum.to.odd({_F64} %u.low, {_F64} %v.low)
  %fused = fadd {_F64} %v.high, %rest
  %plain = fadd {_F64} %p.high, %c
  %difference = fsub {_F64} %fused, %fused
  %usual = fcmp ord {_F64} %difference, zeroinitializer
  %result = select <{_N} x i1> %usual, {_F64} %fused, {_F64} %plain
  ret {_F64} %result
}}
"""
