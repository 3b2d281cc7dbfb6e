"""Steps as C99: their bits by gcc and clang, and how the file reads."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import fusecell as fc
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.sizes import DType
from fusecell.exporting.c_source.axes import AXIS_LOOPS
from fusecell.exporting.c_source.expressions import POINTWISE
from fusecell.exporting.c_source.functions import c_number
from tests.compiler.axis_cells import AXES, AxisCell
from tests.compiler.cell_recipes import RandomCell
from tests.compiler.random_cells import recipes
from tests.exporting.models import EveryFunction, four_cells
from tests.exporting.test_targets import verified
from tests.several_inputs import CELLS

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler: apt-get install gcc")


def test_c_is_written_for_every_primitive():
    assert {name for name, primitive in PRIMITIVES.items() if primitive.pointwise} == POINTWISE
    assert {name for name, primitive in PRIMITIVES.items() if primitive.category == "nest"} == set(AXIS_LOOPS)


@given(st.floats(width=64) | st.sampled_from([0.408248290463863, 1e-45, 3.4028235677973366e38, 16777217.0, -0.0]))
def test_numbers_are_rounded_once(value):
    """0.408248290463863, cut to nine digits, is on the other side of the middle of two float32."""
    with np.errstate(over="ignore"):
        expected = np.float32(value)
    text = c_number(value, DType.F32)
    names = {"NAN": "nan", "INFINITY": "inf", "-INFINITY": "-inf"}
    actual = np.float32(names.get(text) or float(text.removesuffix("f")))
    assert actual.tobytes() == expected.tobytes() or (np.isnan(actual) and np.isnan(expected))


@pytest.mark.parametrize("name", ["dict", "tuple"])
def test_several_inputs_and_outputs(name, tmp_path):
    case = CELLS[name]
    export = fc.export(case.cell(), tmp_path / "it", format="c", batch_size=2, input_sizes=case.sizes, verify=True)
    verified(export)
    header = (tmp_path / "it.h").read_text()
    if name == "dict":
        assert "#define IT_INPUT_VALUE_AT 3 /* 2 numbers */" in header
        assert "#define IT_OUTPUT_THE_STATE_AT 2 /* 7 numbers */" in header
        assert "#define IT_OUTPUT_MEMORY_AT 9 /* 6 numbers, [2][3] */" in header


@pytest.mark.parametrize("name", ["attention", "extremes_of_dim", "cumulative", "topk", "scatter_add", "conv2d"])
def test_cells_that_compute_along_axes(name, tmp_path):
    layer = fc.Recurrent(AxisCell(AXES[name]))
    verified(fc.export(layer, tmp_path / "cell", format="c", batch_size=2, verify=True))


@pytest.mark.parametrize("model", [four_cells, lambda: fc.Recurrent(EveryFunction())], ids=["zoo", "functions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits(model, dtype, tmp_path):
    """Both compilers, pedantic and with all warnings as errors."""
    verified(fc.export(model().to(dtype), tmp_path / "cell", format="c", batch_size=2, verify=True))


@needs_compiler
def test_random_cells(tmp_path):
    @seed(2)
    @settings(
        max_examples=4, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(recipes())
    def check(recipe):
        torch.manual_seed(1)
        try:
            stream = fc.Stream(fc.Recurrent(RandomCell(recipe).float()))
            report = fc.export(stream, tmp_path / "cell", format="c", verify=True)
        except fc.NotCompilable:
            return
        except fc.ExportError as error:
            assert "format='c' has no loop for the primitive" in str(error)  # noqa: PT017
            return
        verified(report)

    check()


@needs_compiler
def test_wide_layers_in_blocks(tmp_path):
    """70 columns are two blocks, and the second isn't full; weights beyond are zero."""
    report = verified(fc.export(fc.GRU(3, 70), tmp_path / "gru", format="c", verify=True))
    source = report.files[0].read_text()
    assert "block < 2" in source
    assert re.search(r"static const float r_pre_weight_hh\[2\]\[70\]\[40\]", source)


def test_the_file_reads_like_the_cell(tmp_path):
    """Names are the user's, and the weights are where the equation has them."""

    class Leaky(fc.Cell):
        def __init__(self):
            super().__init__(3, 6)
            self.inp, self.rec = nn.Linear(3, 6), nn.Linear(6, 6, bias=False)

        def step(self, x, state):
            (h,) = state
            drive = self.inp(x) + self.rec(h)
            h = 0.8 * h + 0.2 * torch.relu(drive)
            return h, (h,)

    source = fc.export(Leaky(), tmp_path / "leaky", format="c").files[0].read_text()
    assert "static const float drive_rec_weight[1][6][8]" in source
    assert "const float a = h[k];" in source
    assert re.search(r"drive\[lane\] = FMA\(a, drive_rec_weight\[0\]\[k\]\[lane\], drive\[lane\]\);", source)
    assert re.search(r"const float h_new = \w+ \+ \w+;", source)


@needs_compiler
def test_values_called_like_words_of_c(tmp_path):
    class Awkward(fc.Cell):
        states = ("int", "row")

        def step(self, x, state):
            (double, floor) = state
            signed = torch.tanh(x + double)
            lane = torch.sigmoid(signed - floor)
            return lane, (lane, signed)

    verified(fc.export(Awkward(5, 5), tmp_path / "if", format="c", prefix="FMA_", verify=True))


@needs_compiler
def test_new_states_that_are_other_states(tmp_path):
    """A step that exchanges its states, and one that shifts them."""

    class Shift(fc.Cell):
        states = ("a", "b", "c")

        def step(self, x, state):
            a, b, c = state
            return a + b - c, (x, a, b)

    class Exchange(fc.Cell):
        states = ("a", "b")

        def step(self, x, state):
            a, b = state
            return a + x, (b + x, a)

    class Swap(fc.Cell):
        states = ("a", "b")

        def initial_state(self, batch_size, *, dtype=None, device=None):
            return torch.ones(batch_size, 5, dtype=dtype), torch.zeros(batch_size, 5, dtype=dtype)

        def step(self, x, state):
            a, b = state
            return a + x, (b, a)

    for cell in (Shift(5, 5), Exchange(5, 5), Swap(5, 5)):
        verified(fc.export(cell, tmp_path / "cell", format="c", verify=True))


@needs_compiler
def test_without_fused_multiply_adds_the_error_stays_small(tmp_path):
    """What <PREFIX>_FMA is for: quick where there is no instruction, with other last bits."""
    gru = fc.GRU(4, 16)
    report = fc.export(gru, tmp_path / "gru", format="c")
    (tmp_path / "main.c").write_text(
        '#include "gru.h"\n#include <stdio.h>\n'
        "int main(void) { static gru_stream s; float x[4] = {1, 2, 3, 4}, y[16];\n"
        'gru_init(&s); gru_step(&s, x, y); for (int i = 0; i < 16; i++) printf("%.9g\\n", y[i]); return 0; }\n'
    )
    program = [report.files[0], tmp_path / "main.c", "-o", tmp_path / "main", "-lm"]
    subprocess.run(["gcc", "-std=c99", "-O2", "-DGRU_FMA(a,b,c)=((a)*(b)+(c))", *program], check=True)
    text = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout
    expected = fc.Stream(gru).step(np.array([1, 2, 3, 4], np.float32))
    np.testing.assert_allclose(np.array(text.split(), np.float32), expected, atol=1e-6)
