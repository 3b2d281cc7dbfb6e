import ctypes
import gc
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fusecell as fc
import fusecell.errors
from fusecell.compiler.backend import jit as machine
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.jit import Loaded, load
from fusecell.compiler.backend.target import host_target
from fusecell.errors import CompilerError

SOURCE = Path(fusecell.errors.__file__).parents[1]

# y[i] = fma(a[i], x[i], y[i]): sixteen at a time, then one at a time.
MULTIPLY_ADD = """
define void @multiply_add(ptr %a, ptr %x, ptr %y, i64 %n) #0 {
entry:
  br label %wide
wide:
  %i = phi i64 [ 0, %entry ], [ %i.next, %wide.body ]
  %i.next = add i64 %i, 16
  %fits = icmp ule i64 %i.next, %n
  br i1 %fits, label %wide.body, label %narrow
wide.body:
  %pa = getelementptr float, ptr %a, i64 %i
  %px = getelementptr float, ptr %x, i64 %i
  %py = getelementptr float, ptr %y, i64 %i
  %va = load <16 x float>, ptr %pa, align 4
  %vx = load <16 x float>, ptr %px, align 4
  %vy = load <16 x float>, ptr %py, align 4
  %vr = call <16 x float> @llvm.fma.v16f32(<16 x float> %va, <16 x float> %vx, <16 x float> %vy)
  store <16 x float> %vr, ptr %py, align 4
  br label %wide
narrow:
  %k = phi i64 [ %i, %wide ], [ %k.next, %narrow.body ]
  %more = icmp ult i64 %k, %n
  br i1 %more, label %narrow.body, label %done
narrow.body:
  %qa = getelementptr float, ptr %a, i64 %k
  %qx = getelementptr float, ptr %x, i64 %k
  %qy = getelementptr float, ptr %y, i64 %k
  %sa = load float, ptr %qa
  %sx = load float, ptr %qx
  %sy = load float, ptr %qy
  %sr = call float @llvm.fma.f32(float %sa, float %sx, float %sy)
  store float %sr, ptr %qy
  %k.next = add i64 %k, 1
  br label %narrow
done:
  ret void
}
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare float @llvm.fma.f32(float, float, float)
attributes #0 = { "prefer-vector-width"="512" }
"""

SCALAR_SUM = """
define float @total(ptr %x, i64 %n) {
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i.next, %loop ]
  %sum = phi float [ 0.0, %entry ], [ %sum.next, %loop ]
  %p = getelementptr float, ptr %x, i64 %i
  %v = load float, ptr %p
  %sum.next = fadd reassoc float %sum, %v
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %n
  br i1 %more, label %loop, label %done
done:
  ret float %sum.next
}
"""


def adder(amount: int) -> str:
    return f"define i32 @add(i32 %i) {{\n  %j = add i32 %i, {amount}\n  ret i32 %j\n}}\n"


def call_add(loaded: Loaded, value: int) -> int:
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(loaded.address("add"))(value)


def multiply_add(loaded: Loaded, a: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    result = y.copy()
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(loaded.address("multiply_add"))
    function(a.ctypes.data, x.ctypes.data, result.ctypes.data, len(a))
    return result


def available_targets() -> list[str]:
    present = llvm.host().features
    fitting, needed = ["native"], set()
    for level, features in instruction_set("x86_64").levels.items():
        needed |= set(features)
        if needed <= present:
            fitting.append(level)
    return fitting


TARGETS = available_targets()
needs_avx512 = pytest.mark.skipif("x86-64-v4" not in TARGETS, reason="the CPU has no AVX-512")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSECELL_TARGET", raising=False)


def run_python(script: str, tmp_path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"FUSECELL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


PRELUDE = """
import ctypes, os, threading
from fusecell.compiler.backend.jit import load
from fusecell.compiler.backend.target import host_target

def adder(amount):
    return "define i32 @add(i32 %i) { %j = add i32 %i, " + str(amount) + " ret i32 %j }"

def call_add(loaded, value):
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(loaded.address("add"))(value)
"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100, 257])
def test_numbers_agree_with_float64(monkeypatch, target, size):
    monkeypatch.setenv("FUSECELL_TARGET", target)
    rng = np.random.default_rng(size)
    a, x, y = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
    result = multiply_add(load(MULTIPLY_ADD, ["multiply_add"], host_target()), a, x, y)
    exact = a.astype(np.float64) * x + y
    np.testing.assert_array_equal(result, exact.astype(np.float32))


@pytest.mark.parametrize("target", TARGETS)
def test_multiply_add_rounds_once(monkeypatch, target):
    monkeypatch.setenv("FUSECELL_TARGET", target)
    a = np.full(33, 1 + 2**-12, np.float32)
    y = np.full(33, -(1 + 2**-11), np.float32)
    result = multiply_add(load(MULTIPLY_ADD, ["multiply_add"], host_target()), a, a, y)
    assert (a * a + y == 0).all()  # what two roundings give
    np.testing.assert_array_equal(result, np.full(33, 2**-24, np.float32))


def test_all_targets_give_equal_bits(monkeypatch):
    rng = np.random.default_rng(0)
    a, x, y = (rng.standard_normal(1003).astype(np.float32) * 1e10 for _ in range(3))
    a[5], x[600], y[1002] = np.nan, np.inf, -np.inf
    bits = set()
    for target in TARGETS:
        monkeypatch.setenv("FUSECELL_TARGET", target)
        bits.add(multiply_add(load(MULTIPLY_ADD, ["multiply_add"], host_target()), a, x, y).tobytes())
    assert len(bits) == 1


@needs_avx512
def test_code_uses_the_target_s_vectors(monkeypatch):
    for target, register in (("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")):
        monkeypatch.setenv("FUSECELL_TARGET", target)
        assembly = load(MULTIPLY_ADD, ["multiply_add"], host_target()).assembly()
        assert "vfmadd" in assembly
        assert register in assembly
        assert ("zmm" in assembly) == (register == "zmm")


def test_vectorisers_and_unrolling_are_off():
    loaded = load(SCALAR_SUM, ["total"], host_target())
    assembly = loaded.assembly()
    additions = [line for line in assembly.splitlines() if "add" in line and "xmm" in line]
    assert "ymm" not in assembly
    assert "zmm" not in assembly
    assert len(additions) <= 1  # on other architectures the registers have other names
    x = np.arange(100, dtype=np.float32)
    total = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_void_p, ctypes.c_int64)(loaded.address("total"))
    assert total(x.ctypes.data, 100) == 4950


def test_helpers_are_inlined():
    text = """
    define internal i32 @helper(i32 %i) alwaysinline { %j = mul i32 %i, 37 ret i32 %j }
    define i32 @add(i32 %i) {
      %a = call i32 @helper(i32 %i)
      %b = call i32 @helper(i32 %a)
      ret i32 %b
    }"""
    loaded = load(text, ["add"], host_target())
    assert "helper" not in loaded.assembly()
    assert call_add(loaded, 2) == 2 * 37 * 37


def test_functions_of_libm_are_in_reach():
    text = """
    declare double @erf(double)
    define double @twice(double %x) {
      %a = call double @erf(double %x)
      %b = fadd double %a, %a
      ret double %b
    }"""
    loaded = load(text, ["twice"], host_target())
    twice = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(loaded.address("twice"))
    assert twice(0.3) == pytest.approx(2 * math.erf(0.3), rel=1e-15)


def test_several_names():
    text = adder(1) + adder(2).replace("@add", "@add_two")
    loaded = load(text, ["add", "add_two"], host_target())
    assert call_add(loaded, 1) == 2
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(loaded.address("add_two"))(1) == 3
    with pytest.raises(KeyError, match=r"'multiply' was not exported; exported are: add, add_two"):
        loaded.address("multiply")


REFUSED = {
    "unknown value": (adder(1).replace("ret i32 %j", "ret i32 %k"), r"undefined value '%k'.* Line 3: ret i32 %k"),
    "wrong type": (adder(1).replace("i32 @add", "float @add"), r"doesn't match .* Line 3: ret i32 %j"),
    "not dominated": (
        "define i32 @add(i32 %i) {\n  %c = icmp eq i32 %i, 0\n  br i1 %c, label %a, label %b\n"
        "a:\n  %j = add i32 %i, 1\n  br label %b\nb:\n  ret i32 %j\n}",
        r"(?s)does not dominate all uses.* Line 5: %j = add i32 %i, 1",
    ),
    "cut off": ("define i32 @add(i32 %i) {", r"end of file .* Line 1: define"),
    "nothing": ("", "should define add; it defines nothing"),
    "another name": (adder(1).replace("@add", "@subtract"), "should define add; it defines subtract"),
    "only declared": ("declare i32 @add(i32)", "should define add; it defines nothing"),
    "internal": ("define internal " + adder(1).removeprefix("define "), r"can't be linked: .*add"),
    "unknown function": (
        "declare void @nobody_has_this()\ndefine i32 @add(i32 %i) {\n  call void @nobody_has_this()\n  ret i32 %i\n}",
        "can't be linked: .* not in this process",
    ),
    "foreign triple": ('target triple = "sparc-sun-solaris"\n' + adder(1), "triple 'sparc-sun-solaris'"),
    "foreign layout": ('target datalayout = "e-p:32:32"\n' + adder(1), "data layout 'e-p:32:32'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_text_is_an_error(case):
    text, message = REFUSED[case]
    for _ in range(2):  # nothing of a refused text is remembered
        with pytest.raises(CompilerError, match=message):
            load(text, ["add"], host_target())
    assert call_add(load(adder(5), ["add"], host_target()), 1) == 6


def test_the_target_s_own_triple_and_layout_are_accepted():
    triple = host_target().triple
    assert call_add(load(f'target triple = "{triple}"\n{adder(3)}', ["add"], host_target()), 1) == 4


def test_a_second_load_reads_the_disk_cache():
    first = load(adder(11), ["add"], host_target())
    assert not first.from_cache
    size = first.object_size
    del first
    gc.collect()
    second = load(adder(11), ["add"], host_target())
    assert second.from_cache
    assert second.object_size == size > 0
    assert call_add(second, 1) == 12
    assert second.llvm == adder(11)


def test_a_live_program_is_linked_once_and_then_forgotten():
    first = load(adder(12), ["add"], host_target())
    assert load(adder(12), ["add"], host_target()) is first
    assert load(adder(13), ["add"], host_target()) is not first
    watch = weakref.ref(first)
    del first
    gc.collect()
    assert watch() is None


def test_code_stays_mapped_while_it_is_held():
    loaded = load(adder(14), ["add"], host_target())
    for amount in range(100, 120):
        load(adder(amount), ["add"], host_target())
    gc.collect()
    assert call_add(loaded, 1) == 15


@needs_avx512
def test_targets_do_not_share_code(monkeypatch):
    programs = []
    for target in ("x86-64-v3", "x86-64-v4"):
        monkeypatch.setenv("FUSECELL_TARGET", target)
        programs.append(load(MULTIPLY_ADD, ["multiply_add"], host_target()))
    assert programs[0] is not programs[1]
    assert not programs[1].from_cache


def test_code_without_the_optimiser_is_other_code_with_the_same_bits(monkeypatch):
    """Neither stands for the other, in the process or on disk; explain and show_config say so."""
    torch.manual_seed(0)
    layer, x = fc.Recurrent(fc.cells.LayerNormGRUCell(5, 19)), torch.randn(6, 3, 5)
    results, sizes = [], []
    for effort in (llvm.FULL_EFFORT, 0, llvm.FULL_EFFORT):
        monkeypatch.setattr(llvm, "EFFORT", effort)
        fc.refresh()
        layer.zero_grad()
        y, _ = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
        explanation = fc.explain(layer)
        assert ("without LLVM's optimiser" in str(explanation)) is (effort == 0)
        sizes.append(re.findall(r"([\d,]+) bytes of machine code", str(explanation)))
    fc.refresh()
    assert sizes[0] == sizes[2] != sizes[1]
    for optimised, plain, again in zip(*results, strict=True):
        assert torch.equal(optimised, plain)
        assert torch.equal(optimised, again)


def test_threads_compile_one_text_once(monkeypatch):
    compiled = []
    object_code = llvm.object_code

    def counting(text, *rest):
        compiled.append(text)
        return object_code(text, *rest)

    monkeypatch.setattr(machine.llvm, "object_code", counting)
    gate = threading.Barrier(8)

    def work(_):
        gate.wait()
        return load(adder(21), ["add"], host_target())

    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(work, range(8)))
    assert len(compiled) == 1
    assert all(program is programs[0] for program in programs)


def test_threads_compile_different_texts():
    def work(worker):
        return [call_add(load(adder(1000 + (worker * k) % 30), ["add"], host_target()), 0) for k in range(30)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert results == [[1000 + (worker * k) % 30 for k in range(30)] for worker in range(8)]


def test_processes_share_a_cache(tmp_path):
    script = """
    for amount in range(20):
        assert call_add(load(adder(amount), ["add"], host_target()), 1) == amount + 1
    """
    with ThreadPoolExecutor(4) as pool:
        for process in pool.map(lambda _: run_python(script, tmp_path), range(4)):
            assert (process.returncode, process.stderr) == (0, "")
    names = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert names == [".object"] * 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_runs_and_compiles(tmp_path):
    script = """
    import gc, warnings
    warnings.simplefilter("ignore")  # newer Pythons warn of fork beside threads, which is the point here
    held = load(adder(1), ["add"], host_target())
    stop = threading.Event()

    def keep_compiling():
        amount = 100
        while not stop.is_set():
            load(adder(amount := amount + 1), ["add"], host_target())

    worker = threading.Thread(target=keep_compiling, daemon=True)
    worker.start()
    for attempt in range(20):
        child = os.fork()
        if child == 0:
            good = call_add(held, 1) == 2
            fresh = call_add(load(adder(5000 + attempt), ["add"], host_target()), 1) == 5001 + attempt
            del held
            gc.collect()
            os._exit(0 if good and fresh else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    worker.join()
    assert call_add(held, 1) == 2
    """
    process = run_python(script, tmp_path)
    assert (process.returncode, process.stderr) == (0, "")


def test_the_interpreter_exits_cleanly_while_code_runs(tmp_path):
    script = """
    held = load(adder(1), ["add"], host_target())
    cycle = [load(adder(2), ["add"], host_target())]
    cycle.append(cycle)

    def run_forever():
        while True:
            call_add(held, 1)

    threading.Thread(target=run_forever, daemon=True).start()
    del cycle
    """
    process = run_python(script, tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
