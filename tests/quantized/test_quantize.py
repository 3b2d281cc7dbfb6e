"""Quantized models: the numbers of streams with the same weights, and of torch.nn's layers with rounded weights."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusecell as fc
from fusecell.compiler.backend.target import host_target
from fusecell.quantized import QuantizedCell
from tests.exporting.models import zoo
from tests.several_inputs import CELLS, NamedOutputs, by_name

HALF = pytest.param(
    "float16",
    marks=pytest.mark.skipif(not host_target().converts_half, reason="this CPU has no instruction that reads float16"),
)
FORMATS = ["bfloat16", HALF, "int8", "int8-dynamic"]


def rounded(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose matrices are rounded to a dtype of torch's."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for value in layer.parameters():
            if value.dim() == 2:
                value.copy_(value.to(dtype))
    return layer


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layer", [fc.GRU(17, 45, 2), fc.LSTM(37, 21), fc.RNN(5, 33)], ids=["gru", "lstm", "rnn"])
def test_a_layer_has_the_bits_of_its_stream(layer, format):
    x = torch.randn(71, 3, layer.input_size)
    y, _ = fc.quantize(layer, format)(x)
    assert np.array_equal(y.numpy(), fc.Stream(layer, 3, weights=format).push(x.numpy()))
    assert not y.requires_grad


@pytest.mark.parametrize("arguments", [{"bidirectional": True}, {"batch_first": True}, {"bias": False}])
def test_a_layer_is_torchs_with_rounded_weights(arguments):
    layer = fc.LSTM(9, 13, 2, **arguments)
    reference = nn.LSTM(9, 13, 2, **arguments)
    reference.load_state_dict(rounded(layer, torch.bfloat16).state_dict())
    x = torch.randn(5, 6, 9)
    state = tuple(torch.randn(4 if layer.bidirectional else 2, 6 if not layer.batch_first else 5, 13) for _ in range(2))
    (y, after), (expected, expected_after) = fc.quantize(layer, "bfloat16")(x, state), reference(x, state)
    torch.testing.assert_close((y, *after), (expected, *expected_after), atol=1e-6, rtol=1e-5)
    sequences = [torch.randn(length, 9) for length in (3, 7, 1)]
    both = fc.quantize(layer, "bfloat16"), reference
    packed = [each(pack_sequence(sequences, enforce_sorted=False))[0].data for each in both]
    torch.testing.assert_close(*packed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["gru", "lstm_projected", "lstm_layer_norm", "scrn", "mlstm"])
def test_any_cell_with_lengths_resets_and_in_reverse(name, format):
    cell = fc.cells.MLSTMCell(5, 12) if name == "mlstm" else zoo(name).cell
    layer = fc.Recurrent(cell, reverse=name == "scrn")
    small = fc.quantize(layer, format)
    x, lengths = torch.randn(19, 5, 5), [19, 3, 0, 7, 18]
    resets = torch.rand(19, 5) < 0.2
    for data in ({}, {"lengths": lengths}, {"resets": resets}):
        with fc.runner("compiled"):
            y, after = small(x, **data)
        with fc.runner("eager"):
            expected, expected_after = small(x, **data)
        atol = 1e-5 if format != "int8-dynamic" else 2e-2  # a last bit may round another number to whole
        torch.testing.assert_close(y, expected, atol=atol, rtol=1e-4)
        torch.testing.assert_close(after, expected_after, atol=atol, rtol=1e-4)


def test_rows_and_steps_of_any_number_after_each_other():
    """The packed weights lie in memory that calls of other sizes don't share."""
    layer = fc.GRU(7, 19)
    small = fc.quantize(layer, "int8")
    for steps, rows in [(1, 1), (300, 1), (5, 2), (7, 3), (2, 11), (9, 40), (64, 1), (65, 3), (3, 1)] * 2:
        x = torch.randn(steps, rows, 7)
        assert np.array_equal(small(x)[0].numpy(), fc.Stream(layer, rows, weights="int8").push(x.numpy()))


def test_two_threads_of_pythons():
    small, x = fc.quantize(fc.GRU(37, 65), "int8"), torch.randn(2, 200, 3, 37)
    expected = [small(value)[0] for value in x]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(index: int) -> None:
        for _ in range(20):
            results[index].append(small(x[index])[0])

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(results[index]) == 20
        assert all(torch.equal(each, expected[index]) for each in results[index])


def test_a_model_with_several_layers():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(7, 9)
            self.rnn = fc.Recurrent(fc.Stack(fc.cells.LayerNormGRUCell(9, 11), fc.LSTMCell(11, 13)), batch_first=True)
            self.attention = fc.GRUCell(13, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, x):
            y = self.rnn(self.before(x))[0]
            return self.out(self.attention(y[:, -1]))

    model, x = Tagger(), torch.randn(3, 19, 7)
    small = fc.quantize(model, "int8")
    torch.testing.assert_close(small(x), model(x).detach(), atol=0.02, rtol=0)
    assert isinstance(small.rnn.cell, QuantizedCell)
    assert isinstance(small.attention, QuantizedCell)
    assert [name for name, _ in small.named_parameters()] == ["before.weight", "before.bias", "out.weight", "out.bias"]
    assert torch.equal(model.before.weight, small.before.weight)
    assert not small.training
    assert not small(x).requires_grad
    assert torch.equal(small.train()(x), small.eval()(x))


def test_a_model_in_training_is_quantized_as_in_eval_mode():
    cell = fc.Zoneout(fc.VariationalDropout(fc.GRUCell(5, 7), output=0.5), 0.3)
    layer, x = fc.Recurrent(cell), torch.randn(9, 2, 5)
    small = fc.quantize(layer, "bfloat16")
    assert layer.training
    assert cell.cell.training
    torch.testing.assert_close(small(x)[0], rounded(layer, torch.bfloat16).eval()(x)[0].detach())
    weighted = nn.utils.parametrizations.weight_norm(fc.GRU(5, 7), "weight_hh_l0")
    torch.testing.assert_close(fc.quantize(weighted, "float16")(x)[0], weighted(x)[0].detach(), atol=1e-3, rtol=0)


def test_one_cell_in_two_places_stays_one():
    cell = fc.GRUCell(5, 5)
    small = fc.quantize(nn.ModuleList([fc.Recurrent(cell), fc.Recurrent(cell, reverse=True)]), "bfloat16")
    assert small[0].cell is small[1].cell


def test_images_and_first_states():
    small = fc.quantize(fc.Recurrent(fc.cells.ConvGRUCell(2, 3, size=(5, 4))), "bfloat16")
    x = torch.randn(4, 2, 2, 5, 4)
    assert small(x)[0].shape == (4, 2, 3, 5, 4)
    cell = fc.LearnedState(fc.GRUCell(3, 4))
    with torch.no_grad():
        for value in cell.parameters():
            value.copy_(torch.randn(value.shape))
    x, layer = torch.randn(6, 2, 3), fc.Recurrent(cell)
    expected = rounded(layer, torch.bfloat16)
    resets = torch.rand(6, 2) < 0.4
    y, _ = fc.quantize(layer, "bfloat16")(x, resets=resets)
    torch.testing.assert_close(y, expected(x, resets=resets)[0].detach())


def test_what_is_kept_and_what_is_stored():
    layer = fc.LSTM(17, 23, 2, bidirectional=True)
    small = fc.quantize(nn.ModuleDict({"rnn": layer}), "int8", keep=["rnn.weight_hh_l1_reverse", "weight_ih"])["rnn"]
    formats = [{weight.name: weight.format for weight in cell.weights} for cell in small.cells]
    assert [each["0.weight_ih"] for each in formats] == ["float32"] * 4
    assert [each["0.weight_hh"] for each in formats] == ["int8", "int8", "int8", "float32"]
    whole = fc.quantize(layer, "int8")
    size = sum(value.nbytes for value in whole.state_dict().values())
    assert size < 0.4 * sum(value.nbytes for value in layer.state_dict().values())
    assert "weights='int8'" in repr(whole)
    assert "QuantizedCell(LSTMCell, 17 -> 23, int8)" in repr(whole)


def test_copies_files_and_state_dicts():
    layer, x = fc.LSTM(17, 23, 2, bidirectional=True), torch.randn(5, 3, 17)
    small = fc.quantize(layer, "int8")
    expected = small(x)[0]
    assert torch.equal(copy.deepcopy(small)(x)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x)[0], expected)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], expected)
    other = fc.quantize(fc.LSTM(17, 23, 2, bidirectional=True), "int8")
    for _ in range(3):
        assert not torch.equal(other(x)[0], expected)  # its weights are packed now, its call prepared
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x)[0], expected)
    assert torch.equal(small.float().to("cpu")(x)[0], expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_prepared_calls(batch_first):
    """From the second on calls of a size are prepared; they follow the weights, the state and the form."""
    layer, cell = fc.LSTM(7, 19, batch_first=batch_first), fc.GRUCell(7, 19)
    small, small_cell = fc.quantize(layer, "int8"), fc.quantize(cell, "int8")
    with torch.no_grad():
        for shape in ((5, 3, 7), (5, 7), (1, 1, 7), (5, 3, 7)):
            rows = shape[0 if batch_first else 1] if len(shape) == 3 else None
            for state in (None, tuple(torch.randn(1, *([rows] if rows else []), 19) for _ in range(2))):
                x = torch.randn(shape)
                with fc.runner("eager"):
                    expected, after = small(x, state)
                for _ in range(3):
                    y, last = small(x, state)
                    torch.testing.assert_close((y, *last), (expected, *after), atol=1e-5, rtol=1e-4)
        x, h = torch.randn(3, 7), torch.randn(3, 19)
        with fc.runner("eager"):
            expected = small_cell(x, h), small_cell(x), small_cell(x[0])
        for _ in range(3):
            torch.testing.assert_close((small_cell(x, h), small_cell(x), small_cell(x[0])), expected)
        other = fc.quantize(fc.GRUCell(7, 19), "int8")
        small_cell.load_state_dict(other.state_dict())
        torch.testing.assert_close(small_cell(x, h), other(x, h))
        whole = fc.quantize(fc.GRU(7, 19), "int8")
        for _ in range(3):
            whole(x)
        whole.cells[0] = other
        assert torch.equal(whole(x)[0], fc.scan(other, x)[0])


def test_gradients_of_inputs_by_the_loop():
    layer, x = fc.GRU(3, 5), torch.randn(4, 2, 3, requires_grad=True)
    small = fc.quantize(layer, "bfloat16")
    with pytest.warns(fc.EagerWarning, match="quantized, for inference"):
        small(x)[0].sum().backward()
    (expected,) = torch.autograd.grad(rounded(layer, torch.bfloat16)(x)[0].sum(), x)
    torch.testing.assert_close(x.grad, expected)
    with fc.runner("compiled"), pytest.raises(fc.NotCompilable, match=r"under torch\.no_grad"):
        small(x)
    with fc.runner("compiled"), torch.no_grad():
        small(x)


def test_torchs_transforms_and_its_compiler():
    small, x = fc.quantize(fc.Recurrent(fc.GRUCell(3, 5)), "int8"), torch.randn(4, 2, 3)
    torch.testing.assert_close(torch.func.vmap(lambda value: small(value[:, None])[0][:, 0], 1, 1)(x), small(x)[0])
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x)[0], small(x)[0])


@pytest.mark.parametrize(
    ("make", "arguments", "error", "text"),
    [
        (lambda: fc.GRU(3, 4), {"weights": "int4"}, ValueError, "int8 or|one of bfloat16, float16, int8, int8-dynamic"),
        (lambda: fc.GRU(3, 4), {"weights": "float32"}, ValueError, "got 'float32'"),
        (lambda: fc.GRU(3, 4), {"keep": ["nothing"]}, ValueError, "'nothing', and the weights are weight_ih_l0"),
        (lambda: fc.GRU(3, 4), {"keep": "weight_ih"}, TypeError, r"write keep=\['weight_ih'\]"),
        (lambda: fc.GRU(3, 4).double(), {}, TypeError, "computes in float64"),
        (lambda: nn.GRU(3, 4), {}, TypeError, "fusecell.replace"),
        (
            lambda: fc.Recurrent(fc.cells.GRUDCell(3, 4)),
            {},
            TypeError,
            "GRUDCell takes 3 inputs .*, whose sizes",
        ),
        (lambda: type("Mine", (fc.GRU,), {})(3, 4), {}, TypeError, "Mine is a subclass"),
        (lambda: torch.zeros(3), {}, TypeError, "takes a module"),
    ],
)
def test_what_is_refused(make, arguments, error, text):
    with pytest.raises(error, match=text):
        fc.quantize(make(), **arguments)


def test_what_a_quantized_model_refuses():
    small = fc.quantize(fc.GRU(3, 4), "int8")
    with pytest.raises(TypeError, match=r"can't be converted to torch\.float16"):
        small.half()
    with pytest.raises(TypeError, match="Stream takes the model before"):
        fc.Stream(small)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        small(torch.randn(5, 2, 7))


@pytest.mark.parametrize("name", ["dict", "tuple", "gru_d"])
@pytest.mark.parametrize("format", ["bfloat16", "int8-dynamic"])
def test_cells_of_several_inputs_and_outputs(name, format):
    case = CELLS[name]
    layer, inputs = fc.Recurrent(case.cell()), case.inputs(7, 3)
    small = fc.quantize(layer, format, input_sizes=case.sizes)
    outputs = by_name(small(inputs)[0])
    expected = by_name(fc.Stream(layer, 3, weights=format, input_sizes=case.sizes).push(inputs))
    with fc.runner("eager"):
        interpreted = by_name(small(inputs)[0])
    for key, value in expected.items():
        assert np.array_equal(outputs[key].numpy(), value)
        torch.testing.assert_close(interpreted[key], outputs[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [((3, 2, ()), "those of several inputs are 'a.cell', 'b.cell': pass a dict"), ({"c": (3, 2, ())}, "names 'c'")],
)
def test_sizes_of_inputs_that_fit_no_cell(sizes, text):
    model = nn.ModuleDict({"a": fc.Recurrent(NamedOutputs()), "b": fc.Recurrent(NamedOutputs())})
    with pytest.raises(ValueError, match=text):
        fc.quantize(model, input_sizes=sizes)
    both = {"a.cell": (3, 2, ()), "b.cell": (3, 2, ())}
    assert isinstance(fc.quantize(model, input_sizes=both)["b"].cell, QuantizedCell)
