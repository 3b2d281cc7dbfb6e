"""Exported steps on this machine and on emulated ones, held to the stream's bits."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.codegen import emit
from fusecell.compiler.ir.primitives import LANES
from fusecell.exporting import TARGETS
from fusecell.exporting.program import build_program
from fusecell.exporting.targets import target_named
from tests.exporting.models import EveryFunction, four_cells, zoo


def verified(report: fc.exporting.ExportReport) -> fc.exporting.ExportReport:
    """Return a report whose artefact has run; skip the test where nothing here runs it."""
    if report.verified.startswith("not run"):
        pytest.skip(report.verified)
    assert "the stream's bits" in report.verified
    return report


@pytest.mark.parametrize("name", ["gru", "lstm_projected", "lstm_layer_norm", "scrn"])
@pytest.mark.parametrize("target", ["host", "x86-64-v2"])
def test_cells_on_this_machine(name, target, tmp_path):
    report = verified(fc.export(zoo(name), tmp_path / "cell", target, verify=True))
    assert [path.name for path in report.files] == ["cell.o", "cell.h", "cell.hpp", "cell_selftest.c"]
    assert set(report.external) <= {"memcpy"}


@pytest.mark.parametrize("target", ["aarch64", "cortex-m7", "wasm32"])
def test_four_cells_emulated(target, tmp_path):
    verified(fc.export(four_cells(), tmp_path / "cells", target, verify=True))


@pytest.mark.parametrize("target", ["riscv64", "armv7", "x86-64-v3"])
def test_a_gru_elsewhere(target, tmp_path):
    verified(fc.export(zoo("gru"), tmp_path / "gru", target, verify=True))


@pytest.mark.parametrize("target", ["host", "x86-64-v2", "aarch64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_function_in_both_formats_and_several_rows(target, dtype, tmp_path):
    layer = fc.Recurrent(EveryFunction()).to(dtype)
    report = verified(fc.export(layer, tmp_path / "cell", target, batch_size=3, verify=True))
    assert set(report.external) <= {"memcpy", "sin", "cos", "pow"}


@pytest.mark.parametrize("target", ["host", "x86-64-v3", "x86-64-v4-vnni", "aarch64", "aarch64-dotprod", "armv7"])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_bytes(target, rows, tmp_path):
    """Exact sums: the bits are the stream's, by x86's VNNI, ARM's dot products or float32's multiply-adds."""
    layer = fc.LSTM(37, 21)
    report = verified(fc.export(layer, tmp_path / "it", target, batch_size=rows, weights="int8-dynamic", verify=True))
    assert report.weight_bytes < 4 * 4 * 21 * (37 + 21)


@pytest.mark.parametrize(("target", "count"), [("aarch64-dotprod", 4), ("arm64-apple", 4), ("x86-64-v3-vnni", 2)])
def test_instructions_that_multiply_bytes_are_chosen(target, count):
    """And packed by this machine, which needn't have them: a word of four bytes has as many terms anywhere."""
    machine = target_named(target).machine
    assert machine.byte_dot is not None
    assert LANES // (machine.byte_dot.bits // 32) == count
    (part,) = fc.Stream(fc.GRU(37, 21), weights="int8-dynamic").parts
    assert machine.byte_dot.intrinsic in emit(part.plan, machine).text


@pytest.mark.parametrize("target", TARGETS)
def test_objects_of_every_target_stand_alone(target, tmp_path):
    report = fc.export(fc.GRU(4, 16), tmp_path / "gru", target)
    expected = {"windows": {"_fltused"}, "wasm32": set()}.get(target, {"memcpy"})
    assert set(report.external) <= (set() if target.startswith("cortex") else expected)
    magic = {"arm64-apple": b"\xcf\xfa\xed\xfe", "wasm32": b"\0asm", "windows": b"\x64\x86"}.get(target, b"\x7fELF")
    assert report.files[0].read_bytes().startswith(magic)
    # Three gates of 16 units, from 4 inputs, 16 states and two biases, in groups of 16; those of r and z also as sums.
    assert report.weight_bytes == 4 * 16 * (3 * (4 + 16) + 3 + 3 + 2) + 2 * 64
    assert report.macs == 3 * 16 * (4 + 16)


def test_a_gru_on_a_microcontroller_is_small(tmp_path):
    report = fc.export(fc.GRU(4, 16), tmp_path / "gru", "cortex-m7")
    assert 4_000 < report.code_bytes < 10_000
    assert report.state_bytes == 64
    assert report.state_bytes + report.scratch_bytes < 1_024


@pytest.mark.parametrize("target", ["host", "wasm32", "cortex-m7"])
def test_steps_that_are_too_long_to_be_inlined(target, tmp_path, monkeypatch):
    """Functions stay functions then, and are called through tables: of addresses of 4 bytes, too."""
    monkeypatch.setattr("fusecell.exporting.program.MOST_INLINED_BYTES", 0)
    verified(fc.export(zoo("gru_layer_norm"), tmp_path / "cell", target, verify=True))


def test_a_wrong_bit_is_found(tmp_path):
    """Flip a bit of the mantissa of one packed weight in the object."""
    stream = fc.Stream(fc.GRU(4, 16))
    program = build_program(stream.parts, "gru", target_named("host"))
    weight = stream.parts[0].weights[2][5, 3].tobytes()
    assert program.code.count(weight) == 1
    wrong = weight[:2] + bytes([weight[2] ^ 0x10]) + weight[3:]

    from fusecell.exporting.artefact import interface_of
    from fusecell.exporting.reference import reference_numbers
    from fusecell.exporting.verify import run_object

    interface = interface_of(stream, "gru", program.memory.bytes, "")
    numbers = reference_numbers(stream.parts, 1, fused=target_named("host").machine.fma)
    run_object(program.code, target_named("host"), interface, numbers, [])
    with pytest.raises(fc.ExportError, match=r"differs from the stream in \d+ of 192 outputs"):
        run_object(program.code.replace(weight, wrong), target_named("host"), interface, numbers, [])


def test_denormal_states_count_as_zero():
    """A state that decays below the least normal number becomes zero, in the artefact as in the stream."""

    class Decay(fc.Cell):
        def step(self, x, state):
            (h,) = state
            h = 0.3 * h + x
            return h, (h,)

    stream = fc.Stream(Decay(5, 5))
    program = build_program(stream.parts, "decay", target_named("host"))
    library = llvm.link(program.code, ["decay_init", "decay_push"])
    memory = np.zeros(program.memory.bytes + 64, np.uint8)
    address = (memory.ctypes.data + 63) & -64
    x, y = np.zeros((100, 5), np.float32), np.zeros((100, 5), np.float32)
    x[0] = 1
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(library.addresses["decay_init"])(address)
    push = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
    push(library.addresses["decay_push"])(address, 100, x.ctypes.data, y.ctypes.data)
    assert (y[:72] > 0).all()  # 0.3^71 is 8e-38, and 1.2e-38 the least normal number
    assert (y[73:] == 0).all()
    assert (y == stream.push(x)).all()
    assert np.float32(1e-30) * np.float32(1e-10) > 0  # the caller's mode is as it was


def test_a_library_is_called_from_another_language(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler: apt-get install gcc")
    gru = fc.GRU(4, 16)
    report = fc.export(gru, tmp_path / "gru", format="shared", prefix="model")
    library = ctypes.CDLL(str(report.files[0]))
    header = report.files[1].read_text()
    size = int(re.search(r"MODEL_MEMORY_BYTES (\d+)", header)[1])
    memory = np.zeros(size + 64, np.uint8)
    stream = ctypes.c_void_p((memory.ctypes.data + 63) & -64)
    assert library.model_init(ctypes.c_void_p(stream.value + 4)) == 1
    assert library.model_init(stream) == 0
    x, y = np.ones(4, np.float32), np.zeros(16, np.float32)
    library.model_step(stream, x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p))
    assert (y == fc.Stream(gru).step(x)).all()


def test_two_models_live_in_one_program(tmp_path):
    """Symbols have prefixes, all others are local; the C++ wrappers compile."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    for name, layer in (("one", fc.GRU(3, 5)), ("two", fc.LSTM(3, 5))):
        fc.export(layer, tmp_path / name, format="static")
    (tmp_path / "main.cpp").write_text(
        '#include "one.hpp"\n#include "two.hpp"\n'
        "int main() { one::Stream a; two::Stream b; auto y = a.step({1, 2, 3}); auto s = b.state(); b.set_state(s);\n"
        "  return y == b.step({1, 2, 3}) || s.size() != 10 || two::Stream::state_size != 10; }\n"
    )
    program = [tmp_path / "main.cpp", tmp_path / "one.a", tmp_path / "two.a", "-o", tmp_path / "main"]
    subprocess.run(["g++", "-std=c++11", "-Wall", "-Wextra", "-Werror", *program], check=True)
    subprocess.run([tmp_path / "main"], check=True)


def test_a_loaded_stream_is_exported_from_its_first_state(tmp_path):
    fc.Stream(fc.Recurrent(EveryFunction())).save(tmp_path / "cell.fusecell")
    stream = fc.load_stream(tmp_path / "cell.fusecell")
    stream.push(np.ones((3, 5), np.float32))
    before = stream.state
    verified(fc.export(stream, tmp_path / "cell", verify=True))
    assert all((a == b).all() for a, b in zip(before, stream.state, strict=True))


def test_bad_input_is_refused_with_a_reason(tmp_path):
    gru, path = fc.GRU(3, 4), tmp_path / "gru"
    for arguments, message in (
        (("vax",), r"No target is called 'vax'; there are: host, x86-64-v2"),
        (("c",), r"target is 'c', and no machine but a format: pass it as format='c'"),
        (("host", "elf"), r"format is 'elf'; expected one of object, static, shared, c, web"),
        (("cortex-m4", "shared"), r"no shared libraries for cortex-m4"),
    ):
        with pytest.raises((ValueError, fc.ExportError), match=message):
            fc.export(gru, path, *arguments)
    with pytest.raises(ValueError, match=r"prefix of symbols is '2nd'"):
        fc.export(gru, tmp_path / "2nd")
    with pytest.raises(ValueError, match=r"computes in float32 only.*\.float\(\)"):
        fc.export(fc.GRU(3, 4).double(), path, "cortex-m4")
    with pytest.raises(TypeError, match="takes a cell or a layer"):
        fc.export(nn.Linear(3, 4), path)
    assert fc.export(gru, tmp_path / "my-model.v2.o").files[1].name == "my-model.v2.h"
