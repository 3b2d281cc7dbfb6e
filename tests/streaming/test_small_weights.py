"""Streams whose matrices are stored in 16 or 8 bits, against streams and layers of the numbers that they stand for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

import fusecell as fc
from fusecell.compiler.backend.target import host_target
from fusecell.compiler.ir.graph import rebuild
from fusecell.compiler.ir.storage import Storage
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.streaming.file import digest
from tests.exporting.test_targets import verified

HALF = pytest.param("float16", marks=pytest.mark.skipif(not host_target().converts_half, reason="no float16 here"))
SIXTEEN_BITS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def chain(dtype=torch.float32):
    """Cells whose depths are odd, and one that a readout follows."""
    cells = fc.Stack(fc.GRUCell(7, 33), fc.LSTMCell(33, 19), fc.cells.LeakyCell(19, 21))
    return fc.Sequential(fc.Recurrent(cells), nn.Linear(21, 3)).to(dtype)


def rounded(module, dtype):
    """The module with its matrices rounded to a format of 16 bits."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(dtype))
    return module


def dequantised(module, by_rows=True):
    """The module with its matrices rounded to 255 numbers for each output."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                scale = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round().clamp(-127, 127) * scale)
    return module


@pytest.mark.parametrize("format", ["bfloat16", HALF])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_sixteen_bits_are_those_of_rounded_weights(format, rows):
    module = chain()
    x = np.random.default_rng(1).standard_normal((70, rows, 7), np.float32)
    small = fc.Stream(module, rows, weights=format)
    same = fc.Stream(rounded(module, SIXTEEN_BITS[format]), rows)
    assert (small.push(x) == same.push(x)).all()
    assert all((one == other).all() for one, other in zip(small.state, same.state, strict=True))
    small.reset()
    same.reset()
    assert (np.stack([small.step(each) for each in x[:5]]) == np.stack([same.step(each) for each in x[:5]])).all()


def in_float32(part):
    """A part with the same numbers, which its kernel reads as float32."""

    def rewritten(builder, index, args):
        node = part.graph[index]
        attrs = {name: value for name, value in node.attrs.items() if name != "stored"}
        return builder.add(node.op, *args, name=node.name, **attrs)

    graph = rebuild(part.graph, rewritten)
    return replace(part, graph=graph, kernel=compile_graph(graph))


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int8-dynamic"])
def test_every_cell_of_the_zoo(zoo_cell, format):
    """The bits of the same numbers read as float32, and no more than an error of rounding from the cell's own."""
    cell = zoo_cell.make(5, 19).eval()
    try:
        small = fc.Stream(cell, weights=format)
    except TypeError as error:
        pytest.skip(str(error))
    same = fc.Stream.of_parts([in_float32(part) for part in small.parts], 1)
    x = np.random.default_rng(1).standard_normal((9, *np.atleast_1d(small.input_size))).astype(np.float32)
    y = small.push(x)
    assert (y == same.push(x)).all()
    exact = fc.Stream(cell).push(x)
    assert np.abs(y - exact).max() <= 0.1 * max(1.0, np.abs(exact).max())


@pytest.mark.parametrize("rows", [1, 4])
def test_eight_bits_are_near_the_numbers_that_they_stand_for(rows):
    module = chain()
    x = np.random.default_rng(1).standard_normal((50, rows, 7), np.float32)
    small = fc.Stream(module, rows, weights="int8").push(x)
    with torch.no_grad():
        exact = dequantised(module.double())(torch.from_numpy(x).double())[0].numpy()
    assert np.abs(small - exact).max() < 1e-5


def in_whole_numbers(x, weight):
    """x @ weight.T as int8-dynamic has it: exact sums of whole numbers, of 1,040 features at a time, and the scales."""
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-37)
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    whole = (x * (127 / largest)).round().double()
    sums = whole @ (weight / scale[:, None]).round().double().T
    return sums * scale.double() * largest.double() / 127


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("inputs", [30, 2083])
def test_whole_numbers_times_whole_numbers(inputs, rows):
    """Step by step, so that what is rounded has the same bits here and there."""
    torch.manual_seed(0)
    cell = fc.RNNCell(inputs, 19)
    x = torch.randn(20, rows, inputs)
    x[3], x[4, 0], x[5] = 0, 1e-35, 1e30
    stream = fc.Stream(cell, rows, weights="int8-dynamic")
    for each in x:
        (h,) = map(torch.from_numpy, stream.state)
        y = torch.from_numpy(stream.step(each.numpy()).reshape(rows, -1).copy())
        with torch.no_grad():
            of_x = in_whole_numbers(each, cell.weight_ih) + cell.bias_ih
            expected = torch.tanh(of_x + in_whole_numbers(h.reshape(rows, -1), cell.weight_hh) + cell.bias_hh)
        assert (y - expected).abs().max() < 1e-6


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "native"])
def test_sums_of_whole_numbers_have_the_same_bits_on_every_level(level, monkeypatch):
    """With an instruction for bytes or without one."""
    torch.manual_seed(1)
    cell = fc.cells.LeakyCell(1101, 37)
    x = np.random.default_rng(1).standard_normal((9, 3, 1101), np.float32)
    stream = fc.Stream(cell, 3, weights="int8-dynamic")
    expected = fc.Stream.of_parts([in_float32(part) for part in stream.parts], 3).push(x)
    monkeypatch.setenv("FUSECELL_TARGET", level)
    try:
        host_target()
    except ValueError as error:
        pytest.skip(str(error))
    assert (fc.Stream(cell, 3, weights="int8-dynamic").push(x) == expected).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_whole_numbers(value):
    torch.manual_seed(2)
    x = np.ones((2, 5, 7), np.float32)
    x[0, 1, 3] = value
    y = fc.Stream(fc.GRUCell(7, 11), 5, weights="int8-dynamic").push(x)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(np.delete(y, 1, axis=1)).all()


def test_an_output_without_weights_is_zero_in_eight_bits():
    cell = fc.cells.LeakyCell(3, 17)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter[2] = 0
    assert (fc.Stream(cell, weights="int8").push(np.ones((4, 3), np.float32))[:, 2] == 0).all()


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(numbers, min_size=1, max_size=40))
def test_numbers_are_rounded_as_torch_rounds_them(values):
    array = np.array(values, np.float32)
    for storage, dtype in ((Storage.BF16, torch.bfloat16), (Storage.F16, torch.float16)):
        expected = torch.from_numpy(array).to(dtype)
        # What overflows is the largest number here, and infinity there.
        expected = expected.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        assert (storage.rounded(array) == expected.float().numpy()).all()
        assert (storage.decode(storage.encode(storage.rounded(array))) == storage.rounded(array)).all()


@pytest.mark.parametrize("format", ["bfloat16", HALF, "int8", "int8-dynamic"])
def test_files_keep_the_format(format, tmp_path):
    module, x = chain(), np.random.default_rng(1).standard_normal((9, 7), np.float32)
    stream = fc.Stream(module, weights=format)
    stream.save(tmp_path / "small")
    fc.Stream(module).save(tmp_path / "full")
    again = fc.load_stream(tmp_path / "small")
    assert (again.push(x) == stream.push(x)).all()
    assert [each.format for each in again.weights] == [each.format for each in stream.weights]
    tensors = {name: value.nbytes for name, value in load_file(tmp_path / "small").items()}
    full = {name: value.nbytes for name, value in load_file(tmp_path / "full").items()}
    assert sum(tensors.values()) < (0.4 if "int8" in format else 0.6) * sum(full.values())


def damaged(path, change):
    """Rewrite a stream's file with another text of its parts, and the checksum that goes with it."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        about = dict(file.metadata())
    tensors = load_file(path)
    parts = json.loads(about["parts"])
    parts[0]["graph"] = change(parts[0]["graph"])
    about["parts"] = json.dumps(parts)
    about["sha256"] = digest(about["parts"], tensors)
    save_file(tensors, path, about)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"stored": "bf16"', '"stored": "i8"', "expected int8"),
        ('"stored": "bf16"', '"stored": "f8"', "is stored as"),
        ('"stored": "bf16"', '"stored": 1', "is stored as"),
        ('{"shape": [30]}', '{"shape": [30], "stored": "bf16"}', "is stored as"),
    ],
)
def test_a_file_that_stores_otherwise_is_refused(old, new, message, tmp_path):
    path = tmp_path / "small"
    fc.Stream(fc.GRUCell(5, 10), weights="bfloat16").save(path)
    damaged(path, lambda text: text.replace(old, new))
    with pytest.raises(fc.streaming.file.StreamFileError, match=message):
        fc.load_stream(path)


def test_a_stored_weight_that_is_no_product_s_is_refused(tmp_path):
    """A kernel reads such a weight in a panel only: anything else would read it as float32 numbers."""

    class Picks(fc.Cell):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def step(self, x, state):
            (h,) = state
            h = torch.tanh(x @ self.weight + self.weight[(x[:, 0] > 0).long()] + h)
            return h, (h,)

    stream = fc.Stream(Picks(), weights="int8")
    assert [each.reason for each in stream.weights] == ["read by take"]
    path = tmp_path / "small"
    stream.save(path)
    damaged(
        path, lambda text: text.replace('weight() {"shape": [4, 4]}', 'weight() {"shape": [4, 4], "stored": "bf16"}')
    )
    with pytest.raises(fc.streaming.file.StreamFileError, match="stored for products alone"):
        fc.load_stream(path)


def test_keep_and_reasons():
    stream = fc.Stream(chain(), weights="int8", keep=["0.weight_hh", "module_weight"])
    formats = {each.name: (each.format, each.reason) for each in stream.weights}
    assert formats["0.weight_hh"] == ("float32", "as asked")
    assert formats["3.module_weight"] == ("float32", "as asked")
    assert formats["0.weight_ih"] == ("int8", "")
    assert formats["0.bias_ih"] == ("float32", "not a matrix")
    assert sum(each.format == "int8" for each in stream.weights) == 5


def test_tied_weights_are_multiplied_from_both_sides():
    class Tied(fc.Cell):
        def __init__(self):
            super().__init__(6, 6)
            self.weight = nn.Parameter(torch.randn(6, 6))

        def step(self, x, state):
            (h,) = state
            h = torch.tanh(x @ self.weight + h @ self.weight.T)
            return h, (h,)

    assert fc.Stream(Tied(), weights="int8").weights[0].reason == "multiplied from both sides"


def test_a_bias_and_a_shared_operand_of_whole_numbers():
    """A product whose operand another one has too is of the same whole numbers: it is rounded once."""

    class Two(fc.Cell):
        def __init__(self):
            super().__init__(6, 6)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def step(self, x, state):
            (h,) = state
            h = torch.tanh(self.first(x) * self.second(x) + h)
            return h, (h,)

    (part,) = fc.Stream(Two(), weights="int8-dynamic").parts
    assert sum(node.op == "round" for _, node in part.graph) == 1


def test_refresh_keeps_the_format():
    cell = fc.GRUCell(5, 10)
    stream = fc.Stream(cell, weights="int8", keep=["weight_ih"])
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    stream.refresh()
    again = fc.Stream(cell, weights="int8", keep=["weight_ih"])
    assert stream.weights == again.weights
    x = np.ones((3, 5), np.float32)
    assert (stream.push(x) == again.push(x)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "int4"}, ValueError, "one of float32, bfloat16, float16, int8, int8-dynamic"),
        ({"weights": "int8", "keep": "weight_hh"}, TypeError, r"write keep=\['weight_hh'\]"),
        ({"weights": "int8", "keep": ["weight"]}, ValueError, "the weights are 0.weight_ih"),
        ({"keep": ["weight_hh"]}, ValueError, "with weights='float32' all do"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        fc.Stream(fc.GRUCell(5, 10), **arguments)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="compute in float32"):
        fc.Stream(fc.GRUCell(5, 10).double(), weights="bfloat16")


def test_infinite_weights_stay_float32():
    cell = fc.GRUCell(5, 10)
    with torch.no_grad():
        cell.weight_ih[0, 0] = float("inf")
    assert fc.Stream(cell, weights="int8").weights[0].reason == "not all of it is finite"


@pytest.mark.parametrize("value", [2e5, -7e4])
def test_weights_beyond_the_range_of_float16_stay_float32(value):
    if not host_target().converts_half:
        pytest.skip("no float16 here")
    cell = fc.GRUCell(5, 10)
    with torch.no_grad():
        cell.weight_ih[0, 0] = value
    weights = fc.Stream(cell, weights="float16").weights
    assert [each.format for each in weights] == ["float32", "float32", "float16", "float32"]
    assert weights[0].reason == "beyond the range of float16"
    assert fc.Stream(cell, weights="bfloat16").weights[0].format == "bfloat16"


def test_denormal_weights_are_zeros_in_eight_bits():
    cell = fc.cells.LeakyCell(3, 17)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter[2] *= 1e-43
    y = fc.Stream(cell, weights="int8").push(np.ones((4, 3), np.float32))
    assert (y[:, 2] == 0).all()
    assert np.isfinite(y).all()


def test_a_file_of_float16_where_nothing_reads_it(tmp_path, monkeypatch):
    if not host_target().converts_half:
        pytest.skip("no float16 here")
    path = tmp_path / "half"
    fc.Stream(fc.GRUCell(5, 10), weights="float16").save(path)
    monkeypatch.setenv("FUSECELL_TARGET", "x86-64-v2")
    with pytest.raises(fc.streaming.file.StreamFileError, match="can't run here: x86-64-v2 has no instruction"):
        fc.load_stream(path)


def test_error_of_weights_of_a_batch_first_layer():
    torch.manual_seed(3)
    layer, x = fc.GRU(5, 9), torch.randn(30, 4, 5)
    expected = fc.weight_error(layer, x, "int8")
    layer.batch_first = True
    assert fc.weight_error(layer, x.transpose(0, 1), "int8") == expected


def test_error_of_weights():
    module, x = chain(), torch.randn(60, 2, 7)
    errors = {name: fc.weight_error(module, x, name) for name in ("bfloat16", "int8")}
    for report in errors.values():
        assert [each.name for each in report.values] == ["output", "0.h", "1.h", "1.c", "2.h"]
        assert all(0 < each.rms <= each.largest < 0.05 for each in report.values)
        assert report.bytes < 0.6 * report.float32_bytes
    small = fc.Stream(module, 2, weights="int8").push(x)
    exact = fc.Stream(module, 2).push(x)
    assert errors["int8"].values[0].largest == np.abs(small.astype(np.float64) - exact).max()
    assert "int8 weights:" in str(errors["int8"])
    with pytest.raises(ValueError, match=r"\(T, 7\) or \(T, N, 7\)"):
        fc.weight_error(module, torch.randn(60, 8))
    with pytest.raises(ValueError, match="got"):
        fc.weight_error(module, torch.randn(0, 7))


@pytest.mark.parametrize("format", ["bfloat16", HALF, "int8", "int8-dynamic"])
@pytest.mark.parametrize("kind", ["object", "c"])
def test_exports_have_the_stream_s_bits(format, kind, tmp_path):
    report = fc.export(chain(), tmp_path / "cell", format=kind, batch_size=2, verify=True, weights=format)
    verified(report)
    full = fc.export(chain(), tmp_path / "full", format=kind, batch_size=2)
    assert report.weight_bytes < (0.45 if "int8" in format else 0.65) * full.weight_bytes


def test_a_target_without_float16_is_refused(tmp_path):
    if not host_target().converts_half:
        pytest.skip("no float16 here")
    with pytest.raises(ValueError, match="store them as bfloat16"):
        fc.export(fc.GRUCell(3, 5), tmp_path / "cell", target="riscv64", weights="float16")


def test_a_stream_is_exported_as_it_is(tmp_path):
    stream = fc.Stream(fc.GRUCell(3, 5), weights="int8")
    assert fc.export(stream, tmp_path / "cell").weight_bytes < 1000
    with pytest.raises(ValueError, match="with the weights that it has"):
        fc.export(stream, tmp_path / "cell", weights="bfloat16")
