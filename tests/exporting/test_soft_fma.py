"""Multiply-adds without the instruction, against the C library's ``fmaf`` and ``fma``."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest

from fusecell.compiler.backend.jit import load
from fusecell.compiler.backend.target import host_target
from fusecell.exporting.soft_fma import with_soft_fma

ENTRY = """\
declare <16 x {real}> @llvm.fma.v16{dtype}(<16 x {real}>, <16 x {real}>, <16 x {real}>)
define void @all(ptr %a, ptr %b, ptr %c, ptr %y) {{
  %x0 = load <16 x {real}>, ptr %a, align 8
  %x1 = load <16 x {real}>, ptr %b, align 8
  %x2 = load <16 x {real}>, ptr %c, align 8
  %sum = call <16 x {real}> @llvm.fma.v16{dtype}(<16 x {real}> %x0, <16 x {real}> %x1, <16 x {real}> %x2)
  store <16 x {real}> %sum, ptr %y, align 8
  ret void
}}
"""


@pytest.mark.parametrize(("dtype", "real", "name"), [("f32", "float", "fmaf"), ("f64", "double", "fma")])
def test_bits_of_the_c_library(dtype, real, name):
    text = with_soft_fma(ENTRY.format(dtype=dtype, real=real))
    assert "llvm.fma" not in text
    code = load(text, ["all"], host_target())
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(code.address("all"))
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    kind = ctypes.c_float if real == "float" else ctypes.c_double
    function = getattr(library, name)
    function.restype, function.argtypes = kind, [kind] * 3
    random = np.random.default_rng(0)
    number = np.float32 if real == "float" else np.float64
    for _ in range(400):
        a, b = (random.standard_normal(16) * 2.0 ** random.integers(-20, 20, 16) for _ in range(2))
        a, b = a.astype(number), b.astype(number)
        # Sums that cancel, nearly; that are far apart; and that lie between two numbers, or nearly.
        c = (-a.astype(np.float64) * b * (1 + random.choice([0, 1e-8, 1e-3, 2.0**30], 16))).astype(number)
        c[::5] = random.standard_normal(4) * 2.0**-60
        c[0], a[1], b[2] = np.inf, np.nan, 0
        y = np.empty(16, number)
        run(a.ctypes.data, b.ctypes.data, c.ctypes.data, y.ctypes.data)
        expected = np.array([function(*map(float, each)) for each in zip(a, b, c, strict=True)], number)
        np.testing.assert_array_equal(y, expected)
