"""The vector functions, compiled and run: accuracy against float64 and mpmath, edges as torch, equal bits."""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.binding as llvm
import mpmath
import numpy as np
import pytest
import torch

from fusecell.compiler.codegen import vector_math as simd
from fusecell.compiler.ir.primitives import LANES

FORMATS = {"f32": np.float32, "f64": np.float64}
SCALARS = {"f32": "float", "f64": "double"}
BITS = {"f32": np.uint32, "f64": np.uint64}

# The largest error in ulp, float32 and float64. What IEEE 754 rounds exactly is held to half an ulp. Sweeps over
# every third float32 of a range found exp 0.921, expm1 1.518, log 0.825 (2^-30 to 2^30), log1p 1.392 (up to 2^20),
# sigmoid 2.475; over every one, tanh 2.566 (2^-14 to 10), erf 1.839 (2^-14 to 4).
WITHIN_ULP = {
    "exp": (0.93, 0.93),
    "expm1": (1.55, 2.0),
    "log": (0.85, 0.85),
    "log1p": (1.4, 1.5),
    "tanh": (2.6, 2.6),
    "sigmoid": (2.5, 2.5),
    "sqrt": (0.501, 0.501),
    "rsqrt": (1.5, 1.5),
    "sin": (0.501, 0.6),
    "cos": (0.501, 0.6),
    "erf": (1.9, 2.4),
    "reciprocal": (0.501, 0.501),
    "pow": (0.501, 1.0),
    "atan": (2.1, 1.8),
    "atan2": (2.1, 1.8),
    "erfinv": (0.51, 2.5),
    "lgamma": (0.51, 40.0),
    "digamma": (0.51, 10.0),
    "trigamma": (0.51, 20.0),
    "i0e": (0.51, 4.0),
    "i1e": (0.51, 4.0),
    "erfcx": (0.51, 4.0),
    "ndtri": (0.51, 4.0),
}
WITH_ROOTS = ("lgamma", "digamma")
"""Where the result is smaller than 1, their error is measured in the last place of 1."""
EXACT = ("abs", "neg", "sign", "floor", "maximum", "minimum")
EXACT += ("round", "copysign", "fmod", "to_float16", "to_bfloat16", "to_float32", "nextafter", "mantissa")
MPMATH = {
    **{op: getattr(mpmath, op) for op in ("exp", "expm1", "log", "log1p", "tanh", "sqrt", "sin", "cos", "erf")},
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "pow": mpmath.power,
    "atan": mpmath.atan,
    "atan2": mpmath.atan2,
    "erfinv": mpmath.erfinv,
    "lgamma": lambda x: mpmath.re(mpmath.loggamma(x)),
    "digamma": mpmath.digamma,
    "trigamma": lambda x: mpmath.polygamma(1, x),
    "i0e": lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(0, x),
    "i1e": lambda x: mpmath.exp(-abs(x)) * mpmath.besseli(1, x),
    "erfcx": lambda x: mpmath.exp(x * x) * mpmath.erfc(x),
    "ndtri": lambda p: -normal_quantile(1 - p) if p > 0.5 else normal_quantile(p),
}
FROM_LIBM = {
    ("sin", "f32"),
    ("cos", "f32"),
    ("fmod", "f32"),
    ("fmod", "f64"),
    *((op, "f64") for op in ("sin", "cos", "pow")),
}

X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
_numbers = itertools.count()
both_formats = pytest.mark.parametrize("dtype", FORMATS)
every_op = pytest.mark.parametrize("op", simd.OPS)


# --- compiling and running


def loop_over(op: str, dtype: str) -> str:
    """A module whose function ``apply`` runs an op over arrays."""
    vector = f"<{LANES} x {SCALARS[dtype]}>"
    names = ("x", "y") if op in simd.BINARY_OPS else ("x",)
    loads = "\n".join(
        f"  %{n}.at = getelementptr {vector}, ptr %{n}, i64 %i\n  %{n}.in = load {vector}, ptr %{n}.at, align 8"
        for n in names
    )
    declared = "\n".join(sorted(simd.declarations([op], dtype)))
    return f"""
{declared}
{simd.definitions([op], dtype)}
define void @apply(ptr %x, ptr %y, ptr %out, i64 %count) "prefer-vector-width"="512" {{
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
{loads}
  %result = call {vector} {simd.function_name(op, dtype)}({", ".join(f"{vector} %{n}.in" for n in names)})
  %at = getelementptr {vector}, ptr %out, i64 %i
  store {vector} %result, ptr %at, align 8
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %exit
exit:
  ret void
}}
"""


@contextmanager
def optimised(text: str, cpu: str, triple: str) -> Iterator[tuple[llvm.ModuleRef, llvm.TargetMachine]]:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    host = cpu == "host"
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name() if host else cpu,
        features=llvm.get_host_cpu_features().flatten() if host else "",
        codemodel="small",
        reloc="pic",
    )
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    with llvm.parse_assembly(text) as module:
        module.verify()
        passes.getModulePassManager().run(module, passes)
        yield module, machine


def assembly(op: str, dtype: str, cpu: str, triple: str = "x86_64-unknown-linux-gnu") -> str:
    with optimised(loop_over(op, dtype), cpu, triple) as (module, machine):
        return str(machine.emit_assembly(module))


@functools.cache
def linked(text: str, cpu: str, *names: str) -> tuple[dict[str, int], object]:
    with optimised(text, cpu, llvm.get_process_triple()) as (module, machine):
        code = machine.emit_object(module)
    jit = llvm.create_lljit_compiler()
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for name in names:
        library.export_symbol(name)
    tracker = library.link(jit, f"vector-functions-{next(_numbers)}")
    return {name: tracker[name] for name in names}, (jit, tracker)


def run(op: str, dtype: str, *args: np.ndarray, cpu: str = "host") -> np.ndarray:
    """Apply an op; the arrays are padded to whole vectors."""
    addresses, _ = linked(loop_over(op, dtype), cpu, "apply")
    apply = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(addresses["apply"])
    size = args[0].size
    padded = [np.pad(np.asarray(a, FORMATS[dtype]), (0, -size % LANES), mode="edge") for a in args]
    out = np.empty_like(padded[0])
    apply(padded[0].ctypes.data, padded[-1].ctypes.data, out.ctypes.data, out.size // LANES)
    return out[:size]


def has(cpu: str) -> bool:
    needed = {"x86-64-v2": ["sse4.2"], "x86-64-v3": ["avx2", "fma"], "x86-64-v4": ["avx512f", "avx512vl"]}[cpu]
    features = llvm.get_host_cpu_features()
    return all(features.get(feature, False) for feature in needed)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    text = """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define void @get(ptr %to) {
  call void @llvm.x86.sse.stmxcsr(ptr %to)
  ret void
}
define void @set(ptr %from) {
  call void @llvm.x86.sse.ldmxcsr(ptr %from)
  ret void
}
"""
    addresses, _ = linked(text, "host", "get", "set")
    get, put = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(addresses[name]) for name in ("get", "set"))
    before = ctypes.c_uint32()
    get(ctypes.addressof(before))
    inside = ctypes.c_uint32(before.value | 0x8040)
    put(ctypes.addressof(inside))
    try:
        yield
    finally:
        put(ctypes.addressof(before))


# --- arguments and answers


def grid(op: str, dtype: str, points: int) -> list[np.ndarray]:
    """Arguments where the op has work to do: evenly spaced, spaced by magnitude, and random bits."""
    rng = np.random.default_rng(sum(map(ord, op)))
    float_type, reach = FORMATS[dtype], {"f32": 105.0, "f64": 760.0}[dtype]
    tiny, huge = np.log([np.finfo(float_type).tiny, np.finfo(float_type).max])
    parts = [
        np.linspace(-reach, reach, points),
        np.linspace(-10, 10, points),
        np.linspace(-1.5, 1.5, points),
        np.exp(rng.uniform(tiny, 5, points)) * rng.choice([-1, 1], points),
        np.exp(rng.uniform(tiny, huge, points)) * rng.choice([-1, 1], points),
    ]
    x = np.concatenate([p.astype(float_type) for p in parts] + [random_bits(dtype, points, rng)])
    if op in ("lgamma", "digamma", "trigamma"):
        with np.errstate(invalid="ignore"):
            x = np.where(np.abs(x) < 1e4, x, np.fmod(x, float_type(100)))  # mpmath takes long for larger ones
    if op in ("i0e", "i1e", "erfcx"):
        with np.errstate(invalid="ignore"):
            x = np.where(np.abs(x) < 1e3, x, np.fmod(x, float_type(1000)))
    if op == "ndtri":
        x = np.concatenate([x, rng.uniform(0, 1, 2 * points).astype(float_type)])
    if op not in simd.BINARY_OPS:
        return [x]
    y = rng.permutation(x) if op != "pow" else rng.uniform(-20, 20, x.size)
    return [x, np.where(rng.random(x.size) < 0.3, np.round(y), y).astype(float_type)]


def random_bits(dtype: str, points: int, rng: np.random.Generator) -> np.ndarray:
    """Every kind of number, NaN with a payload too; the quiet bit is set because NumPy warns of signalling NaN."""
    ints, float_type = BITS[dtype], FORMATS[dtype]
    bits = rng.integers(0, np.iinfo(ints).max, points, dtype=ints, endpoint=True)
    quiet = ints(1 << (np.finfo(float_type).nmant - 1))
    return np.where(np.isnan(bits.view(float_type)), bits | quiet, bits).view(float_type)


def by_torch(op: str, *args: np.ndarray) -> np.ndarray:
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in args]
    if op == "trigamma":
        return trigamma(args[0])
    if op == "fmod":
        with np.errstate(invalid="ignore"):
            return np.asarray(np.fmod(*args))  # torch's is NaN where the quotient overflows
    if op.startswith("to_"):
        return np.asarray(tensors[0].to(getattr(torch, op.removeprefix("to_"))).to(tensors[0].dtype))
    if op == "mantissa":
        return np.asarray(torch.frexp(tensors[0]).mantissa)
    return np.asarray((getattr(torch, op, None) or getattr(torch.special, op))(*tensors))


def normal_quantile(p: mpmath.mpf) -> mpmath.mpf:
    """The argument at which the normal distribution is p, up to 1/2."""
    guess = -torch.special.ndtri(torch.tensor(float(p), dtype=torch.float64)).item() / 2**0.5
    root = mpmath.findroot(lambda y: mpmath.log(mpmath.erfc(y)) - mpmath.log(2 * p), mpmath.mpf(guess))
    return -mpmath.sqrt(2) * root


def trigamma(x: np.ndarray) -> np.ndarray:
    """The sum of 1 / (x + k)^2, its tail by Euler and Maclaurin: torch's own is right to 1e-9, not at poles."""
    z = np.where(x < 0.5, 1.0 - x.astype(np.float64), x.astype(np.float64))
    with np.errstate(all="ignore"):
        w = z + 30
        result = sum(1 / (z + k) ** 2 for k in range(30)) + 1 / w + 1 / (2 * w**2) + 1 / (6 * w**3) - 1 / (30 * w**5)
        result += 1 / (42 * w**7) - 1 / (30 * w**9)
        mirrored = (np.pi / np.sin(np.pi * (x.astype(np.float64) - np.round(x.astype(np.float64))))) ** 2 - result
        return np.asarray(np.where(x < 0.5, mirrored, result).astype(x.dtype))


def same_bits(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    """Return whether bits are equal, all NaN being alike."""
    a, b = (np.where(np.isnan(v), FORMATS[dtype](np.nan), v).view(BITS[dtype]) for v in (a, b))
    return bool(np.array_equal(a, b))


def normal(dtype: str, *values: np.ndarray) -> np.ndarray:
    """Return where no value is a denormal or rounds to one."""
    limit = 1.0001 * float(np.finfo(FORMATS[dtype]).tiny)
    return np.all([(v == 0) | (np.abs(v) >= limit) | np.isnan(v) for v in values], axis=0)


# --- accuracy


@pytest.mark.parametrize("op", WITHIN_ULP)
def test_float32_against_float64(op: str) -> None:
    args = grid(op, "f32", 100_000)
    got = run(op, "f32", *args)
    truth = by_torch(op, *(a.astype(np.float64) for a in args))
    with np.errstate(over="ignore"):
        rounded = truth.astype(np.float32)
    there = normal("f32", *args, truth)
    edge = there & ~np.isfinite(rounded)
    np.testing.assert_array_equal(got[edge], rounded[edge])
    inner = there & np.isfinite(rounded)
    size = np.maximum(np.abs(rounded[inner]), 1 if op in WITH_ROOTS else 0, dtype=np.float32)
    error = np.abs(got[inner] - truth[inner]) / np.spacing(size).astype(np.float64)
    worst = int(np.argmax(error))
    assert error[worst] <= WITHIN_ULP[op][0], f"{op} at {[a[inner][worst] for a in args]}"


@pytest.mark.parametrize("op", WITHIN_ULP)
def test_float64_against_mpmath(op: str) -> None:
    args = grid(op, "f64", 600)
    got = run(op, "f64", *args)
    expected = by_torch(op, *args)
    comparable = normal("f64", *args, expected) & (expected != 0) & np.isfinite(expected)
    there = np.flatnonzero(comparable)
    assert there.size > 1000
    with mpmath.workdps(40):
        for i in there:
            point = [float(a[i]) for a in args]
            truth = MPMATH[op](*map(mpmath.mpf, point))
            size = max(abs(expected[i]), 1.0) if op in WITH_ROOTS else abs(expected[i])
            error = abs(mpmath.mpf(float(got[i])) - truth) / float(np.spacing(size))
            assert error <= WITHIN_ULP[op][1], f"{op} at {point}: {float(error):.2f} ulp"


@both_formats
@pytest.mark.parametrize("op", EXACT)
def test_exact_ops_equal_torch(op: str, dtype: str) -> None:
    args = grid(op, dtype, 2_000)
    there = normal(dtype, *args)
    args = [a[there] for a in args]
    assert same_bits(run(op, dtype, *args), by_torch(op, *args), dtype)


def test_every_op_is_measured() -> None:
    assert set(WITHIN_ULP) | set(EXACT) == set(simd.OPS)


# --- edges


@both_formats
@every_op
def test_edges_equal_torch(op: str, dtype: str) -> None:
    numbers = np.finfo(FORMATS[dtype])
    x = np.array([0.0, 1.0, 0.5, 2.0, np.inf, 1e-20, 50.0, 1e4, numbers.max, numbers.tiny])
    x = np.concatenate([x, -x, [np.nan]]).astype(FORMATS[dtype])
    args = [x] if op not in simd.BINARY_OPS else [a.ravel() for a in np.meshgrid(x, x)]
    got, expected = run(op, dtype, *args), by_torch(op, *args)
    there = normal(dtype, expected)
    near_root = 4 * float(numbers.eps) if op in WITH_ROOTS else 0
    np.testing.assert_allclose(got[there], expected[there], rtol=4 * float(numbers.eps), atol=near_root)
    zero = there & (expected == 0)
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(expected[zero]))


@both_formats
def test_exp_overflows_and_underflows_where_it_must(dtype: str) -> None:
    float_type, numbers = FORMATS[dtype], np.finfo(FORMATS[dtype])
    with mpmath.workdps(40):
        top = float_type(float(mpmath.log(mpmath.mpf(float(numbers.max)))))
        bottom = float_type(float(mpmath.log(mpmath.mpf(float(numbers.tiny)))))
        near = [np.nextafter(edge, float_type(to)) for edge in (top, bottom) for to in (-np.inf, np.inf)]
        x = np.array([top, bottom, *near], float_type)
        truth = [mpmath.exp(mpmath.mpf(float(value))) for value in x]
        expected = [np.inf if t > float(numbers.max) else 0.0 if t < float(numbers.tiny) else float(t) for t in truth]
    got = run("exp", dtype, x)
    np.testing.assert_allclose(got, expected, rtol=2 * float(numbers.eps))
    assert np.isinf(got).any()
    assert (got == 0).any()


@both_formats
def test_ranges_and_symmetry(dtype: str) -> None:
    x = np.abs(grid("tanh", dtype, 20_000)[0])
    x = np.append(x[~np.isnan(x)], FORMATS[dtype](0))
    for op in ("tanh", "erf"):
        up, down = run(op, dtype, x), run(op, dtype, -x)
        assert same_bits(up, -down, dtype), "odd to the last bit"
        assert (up.min(), up.max()) == (0, 1)
    both = run("sigmoid", dtype, np.concatenate([x, -x]))
    assert (both.min(), both.max()) == (0, 1)


# --- equal bits


@pytest.mark.skipif(not X86, reason="compares levels of x86-64")
@both_formats
@every_op
def test_same_bits_on_every_level(op: str, dtype: str) -> None:
    args = grid(op, dtype, 500)
    outputs = [run(op, dtype, *args, cpu=cpu) for cpu in LEVELS if has(cpu)]
    for other in outputs[1:]:
        assert same_bits(outputs[0], other, dtype)


@both_formats
@every_op
def test_a_lane_does_not_see_its_neighbours(op: str, dtype: str) -> None:
    args = grid(op, dtype, 200)
    order = np.random.default_rng(3).permutation(args[0].size)
    assert same_bits(run(op, dtype, *args)[order], run(op, dtype, *(a[order] for a in args)), dtype)


@pytest.mark.skipif(not X86, reason="sets the x86 control register")
@both_formats
@every_op
def test_same_bits_with_denormals_as_zero(op: str, dtype: str) -> None:
    args = grid(op, dtype, 2_000)
    usual = run(op, dtype, *args)
    there = normal(dtype, *args, usual) & (normal("f32", *args) | (op != "to_float32"))
    with denormals_as_zero():
        flushed = run(op, dtype, *args)
    assert same_bits(usual[there], flushed[there], dtype)


# --- the text and the code made of it


@both_formats
def test_definitions_are_in_one_order_each_once(dtype: str) -> None:
    text = simd.definitions(["tanh", "exp", "tanh"], dtype)
    assert text == simd.definitions(["exp", "tanh"], dtype)
    assert re.findall(r"^define internal .* (@\S+)\(", text, re.M) == [
        simd.function_name("exp", dtype),
        simd.function_name("tanh", dtype),
    ]


@both_formats
@every_op
def test_declarations_are_what_the_text_calls(op: str, dtype: str) -> None:
    text, declared = simd.definitions([op], dtype), simd.declarations([op], dtype)
    assert "declare" not in text
    defined = set(re.findall(r"^define .* (@\S+)\(", text, re.M))
    called = set(re.findall(r"call .*? (@\S+?)\(", text)) - defined
    assert called == {re.findall(r"@[^(]+", line)[0] for line in declared}


@pytest.mark.parametrize(
    ("op", "dtype"), [(op, dtype) for op in simd.OPS for dtype in FORMATS if (op, dtype) not in FROM_LIBM]
)
@pytest.mark.parametrize(
    ("cpu", "triple"),
    [(level, "x86_64-unknown-linux-gnu") for level in LEVELS] + [("generic", "aarch64-unknown-linux-gnu")],
)
def test_no_function_of_the_c_library(op: str, dtype: str, cpu: str, triple: str) -> None:
    called = set(re.findall(r"\t(?:callq?|bl)\s+(\w+)", assembly(op, dtype, cpu, triple)))
    assert called <= ({"fma", "fmaf"} if cpu == "x86-64-v2" else set())


@pytest.mark.parametrize(("op", "most"), [("exp", 19), ("sigmoid", 17), ("tanh", 21)])
def test_the_hot_functions_stay_short(op: str, most: int) -> None:
    """Vector instructions per 16 float32 in the loop, its load and register copies included."""
    text = assembly(op, "f32", "x86-64-v4")
    (loop,) = re.findall(r"^\.LBB0_1:(.*?)\tj", text, re.M | re.S)
    assert len(re.findall(r"^\tv(?!movups|movdqu)", loop, re.M)) <= most


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no vector function 'gelu': expected one of exp, "):
        simd.definitions(["exp", "gelu"], "f32")
    with pytest.raises(ValueError, match="no vector functions for dtype 'f16': expected one of f32, f64"):
        simd.declarations(["exp"], "f16")
