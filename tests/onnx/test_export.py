"""Layers as ONNX models, run by ONNX Runtime in float32 and by onnx's reference in float64, against the layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusecell as fc
from fusecell import cells
from fusecell.cells import CELLS
from fusecell.cells.structured import STRUCTURED_CELLS

onnx = pytest.importorskip("onnx")
from fusecell.onnx.verify import runner_of  # noqa: E402  # needs onnx


def kinds(model) -> set[str]:
    return {node.op_type for node in model.graph.node}


def names(values) -> list[str]:
    return [value.name for value in values]


class Several(fc.Cell):
    """A cell with states and outputs of several shapes."""

    states = ("a", "b")
    state_sizes = ((2, 3), 4)

    def __init__(self) -> None:
        super().__init__((2, 3), 4)
        self.output_size = {"u": (3, 2), "v": 1}
        self.linear = nn.Linear(6, 4)

    def step(self, x: Tensor, state: tuple[Tensor, ...]):
        a, b = state
        a = torch.tanh(a + x)
        b = b + self.linear(a.flatten(1))
        return {"u": a.transpose(1, 2), "v": b.sum(-1, keepdim=True)}, (a, b)


class Tokens(fc.Cell):
    """A cell that reads token ids."""

    def __init__(self) -> None:
        super().__init__((), 6)
        self.table, self.gru = nn.Embedding(9, 4), nn.GRUCell(4, 6)

    def step(self, x: Tensor, state: tuple[Tensor, ...]):
        h = self.gru(self.table(x), state[0])
        return h, (h,)


class Odd(fc.Cell):
    """A cell of operations that need care: angles, signs, running products, sorted values, positions."""

    def step(self, x: Tensor, state: tuple[Tensor, ...]):
        (h,) = state
        angle = torch.atan2(x, h + 0.1) + torch.copysign(h, x) * 0.1 + torch.fmod(x, 0.7)
        ordered = torch.sort(torch.tanh(angle), dim=-1).values
        picked = ordered.gather(-1, x.argmax(-1, keepdim=True).expand(-1, 5))
        h = torch.tanh(picked + ordered.cumprod(-1).flip(-1) + torch.logsumexp(x, -1, keepdim=True))
        return h, (h,)


MODULES = {
    "gru of two directions": lambda: fc.GRU(5, 7, num_layers=2, bidirectional=True, batch_first=True),
    "gru, reset before": lambda: fc.GRU(5, 7, reset_after=False),
    "lstm": lambda: fc.LSTM(5, 7, num_layers=2, bias=False),
    "projected lstm": lambda: fc.LSTM(5, 7, proj_size=3),
    "rnn": lambda: fc.RNN(5, 7, nonlinearity="relu"),
    "reversed": lambda: fc.Recurrent(cells.MGUCell(5, 7), reverse=True),
    "two cells": lambda: fc.Bidirectional(fc.Recurrent(cells.MGUCell(5, 7)), fc.Recurrent(fc.GRUCell(5, 6))),
    "stack": lambda: fc.Recurrent(fc.Stack(cells.MGUCell(5, 7), fc.GRUCell(7, 7), residual=True)),
    "readouts": lambda: fc.Sequential(fc.Recurrent(cells.LeakyCell(5, 7)), nn.Linear(7, 3), nn.Tanh(), fc.LSTM(3, 4)),
    "learnt first state": lambda: fc.Recurrent(fc.LearnedState(fc.GRUCell(5, 7))),
    "several outputs": lambda: fc.Recurrent(Several(), batch_first=True),
    "odd": lambda: fc.Recurrent(Odd(5, 5)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_verified(name: str) -> None:
    torch.manual_seed(0)
    # Verified on two lengths, by another implementation of the operators: a difference is an error.
    fc.onnx.export(MODULES[name]())
    fc.onnx.export(MODULES[name](), lengths=True)
    fc.onnx.export(MODULES[name]().double(), states=False)


@pytest.mark.parametrize("zoo_cell", CELLS[4::5], ids=lambda zoo_cell: zoo_cell.name)
def test_cells_of_the_zoo(zoo_cell) -> None:
    torch.manual_seed(0)
    fc.onnx.export(zoo_cell.make(5, 8), resets=True, lengths=True)
    fc.onnx.export(zoo_cell.make(5, 8).double(), step=True)


@pytest.mark.parametrize(
    "structured", [cell for cell in STRUCTURED_CELLS if cell.name in ("mlstm", "conv_gru", "gru_d", "rssm")],
    ids=lambda cell: cell.name,
)  # fmt: skip
def test_structured_cells(structured) -> None:
    torch.manual_seed(0)
    inputs = structured.inputs(1, 1, 8)
    shapes = [value.shape[2:] for value in inputs] if isinstance(inputs, tuple) else None
    fc.onnx.export(structured.make(8, 8), input_shapes=shapes)
    fc.onnx.export(structured.make(8, 8).double(), input_shapes=shapes, lengths=True)


@pytest.mark.parametrize("kind", [fc.GRU, fc.LSTM, fc.RNN])
def test_a_row_without_steps_ends_as_it_began(kind) -> None:
    """Where the model is one node, for which ONNX Runtime leaves the memory as it was, be it zeros or not."""
    model = fc.onnx.export(kind(5, 7, bidirectional=True), lengths=True)
    run, _ = runner_of(model)
    x, lengths = np.ones((4, 3, 5), dtype=np.float32), np.array([4, 0, 2])
    states = [np.full((3, 7), at + 0.5, dtype=np.float32) for at in range(len(model.graph.input) - 2)]
    feeds = dict(zip(names(model.graph.input), [x, lengths, *states], strict=True))
    y, *after = run(feeds)
    assert not y[:, 1].any()
    for start, last in zip(states, after, strict=True):
        np.testing.assert_array_equal(last[1], start[1])
        assert not np.array_equal(last[0], start[0])


def test_resets_of_a_layer_that_is_batch_first() -> None:
    torch.manual_seed(0)
    model = fc.onnx.export(fc.GRU(5, 7, batch_first=True), resets=True)
    shape = model.graph.input[1].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in shape] == ["N", "T"]


class Named(fc.Cell):
    """A cell whose states are called like an input, like the output, and like an option of the model."""

    states = ("x", "y", "lengths")

    def step(self, x: Tensor, state: tuple[Tensor, ...]):
        a, b, c = state
        return torch.tanh(a + b - c), (x * 0.5 + b, torch.tanh(a), c * 0.5 + x)


def test_states_that_are_called_like_inputs() -> None:
    model = fc.onnx.export(Named(5, 5), lengths=True)
    assert names(model.graph.input) == ["x", "lengths", "x_1", "y", "lengths_1"]
    assert names(model.graph.output) == ["output", "x_1_out", "y_out", "lengths_1_out"]


class Careful(fc.Cell):
    """A cell of functions that are easily written so that they lose digits, infinities or the sign of zero."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.one = nn.Parameter(torch.ones(()))

    def step(self, x: Tensor, state: tuple[Tensor, ...]):
        y, x = (x * self.one).unbind(-1)
        return torch.stack((x.expm1(), y.log1p(), torch.atan2(y, x), torch.copysign(x, y)), -1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_keep_their_digits(dtype: torch.dtype) -> None:
    model = fc.onnx.export(Careful().to(dtype), step=True, verify=False)
    run, _ = runner_of(model, dtype)
    values = torch.tensor([-40, -1, -0.3, -1e-3, -1e-6, -1e-20, -0.0, 0, 1e-20, 1e-6, 2e-3, 0.7, 1, 5, 1e8, torch.inf])
    values = values.to(dtype)
    pairs = torch.cartesian_prod(values, torch.cat((values, -values[-1:])))
    with np.errstate(all="ignore"):
        y = torch.from_numpy(run({"x": pairs.numpy(), "h": np.zeros((len(pairs), 4), pairs.numpy().dtype)})[0])
    exact = Careful().double().step(pairs.double(), ())[0].detach().to(dtype)
    torch.testing.assert_close(y, exact, rtol=2e-6 if dtype == torch.float32 else 4e-15, atol=0, equal_nan=True)
    assert torch.equal(y[:, 2:].signbit(), exact[:, 2:].signbit())


def test_a_gru_is_one_node_and_any_other_cell_a_scan() -> None:
    gru = fc.onnx.export(fc.GRU(5, 7, bidirectional=True))
    assert {"GRU"} == kinds(gru) & {"GRU", "Scan"}
    assert [node.op_type for node in gru.graph.node].count("GRU") == 1
    assert names(gru.graph.input) == ["x", "0.h", "1.h"]
    assert names(gru.graph.output) == ["y", "0.h_out", "1.h_out"]
    assert "Scan" in kinds(fc.onnx.export(fc.Recurrent(cells.MGUCell(5, 7))))
    # Activations that the node has by other names, resets, which it doesn't have.
    assert "Scan" in kinds(fc.onnx.export(fc.GRU(5, 7, activation="relu")))
    assert "Scan" in kinds(fc.onnx.export(fc.GRU(5, 7), resets=True))


def test_steps_of_a_stateful_model_are_the_sequence(tmp_path) -> None:
    torch.manual_seed(0)
    layer = fc.Sequential(fc.Recurrent(cells.MGUCell(5, 7)), nn.Linear(7, 3))
    x = torch.randn(6, 2, 5)
    y, _ = layer(x)
    fc.onnx.export(layer, tmp_path / "step.onnx", step=True)
    model = onnx.load(tmp_path / "step.onnx")
    run, _ = runner_of(model)
    h = np.zeros((2, 7), dtype=np.float32)
    for t in range(6):
        output, h = run({"x": x[t].numpy(), "h": h})
        np.testing.assert_allclose(output, y[t].detach().numpy(), atol=1e-6)


def test_names_and_shapes_of_several_outputs() -> None:
    model = fc.onnx.export(fc.Recurrent(Several(), batch_first=True))
    assert names(model.graph.output) == ["y.u", "y.v", "a_out", "b_out"]
    shapes = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in model.graph.output]
    assert shapes == [["N", "T", 3, 2], ["N", "T", 1], ["N", 2, 3], ["N", 4]]


def test_token_ids() -> None:
    torch.manual_seed(0)
    model = fc.onnx.export(fc.Recurrent(Tokens()), input_dtype=torch.int64)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


class Forced(fc.Cell):
    """Token ids, a flag that replaces them by the last choice, and noise that is drawn."""

    inputs = ("ids", "forced", "noise")

    def __init__(self) -> None:
        super().__init__((), 3)
        self.states, self.state_sizes = ("h", "choice"), (3, ())
        self.table = nn.Embedding(3, 3)

    def draw(self, steps, batch_size, *, dtype=None, device=None):
        return (torch.randn(steps, batch_size, 3, dtype=dtype, device=device),)

    def step(self, x, state):
        (ids, forced, noise), (h, choice) = x, state
        h = torch.tanh(self.table(torch.where(forced, ids, choice.long())) - 0.5 * h + 0.1 * noise)
        return h, (h, h.argmax(-1).to(h.dtype))


def test_inputs_of_several_dtypes() -> None:
    """Compared by `export` with the layer."""
    torch.manual_seed(0)
    layer, shapes = fc.Recurrent(Forced()), [(), ()]
    dtypes = (torch.int64, torch.bool)
    model = fc.onnx.export(layer, input_shapes=shapes, input_dtype=dtypes, states=False, verify=True)
    kinds = onnx.TensorProto
    assert [each.type.tensor_type.elem_type for each in model.graph.input] == [kinds.INT64, kinds.BOOL, kinds.FLOAT]
    with pytest.raises(TypeError, match=r"one for each of the 2 inputs, got \(torch\.int64,\)"):
        fc.onnx.export(layer, input_shapes=shapes, input_dtype=dtypes[:1])


def test_the_module_is_left_as_it_was() -> None:
    layer = fc.Recurrent(fc.Zoneout(fc.GRUCell(5, 7), 0.2))
    weights = [value.clone() for value in layer.state_dict().values()]
    fc.onnx.export(layer)
    assert layer.training
    assert layer.cell.training
    assert all(torch.equal(a, b) for a, b in zip(weights, layer.state_dict().values(), strict=True))


class Branching(fc.Cell):
    def step(self, x, state):
        return (x if x.sum() > 0 else -x), state


class Gamma(fc.Cell):
    def step(self, x, state):
        return torch.lgamma(x.abs() + 1), state


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda: fc.onnx.export(nn.Linear(5, 7)), TypeError, "takes a cell or a layer of fusecell"),
        (lambda: fc.onnx.export(fc.GRU(5, 7), opset=9), ValueError, "opset 9 is too old"),
        (lambda: fc.onnx.export(fc.GRU(5, 7), step=True, lengths=True), ValueError, "of sequences"),
        (lambda: fc.onnx.export(fc.GRU(5, 7).bfloat16()), TypeError, r"convert it with \.float"),
        (lambda: fc.onnx.export(Branching(5, 5)), fc.NotCompilable, "reads the value of a tensor"),
        (lambda: fc.onnx.export(Gamma(5, 5)), fc.ExportError, "lgamma, for which ONNX has no operator"),
    ],
)
def test_errors(call, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        call()


def test_a_wrong_model_is_found(monkeypatch) -> None:
    from fusecell.onnx import primitives

    monkeypatch.setitem(primitives.RULES, "tanh", primitives.RULES["sigmoid"])
    with pytest.raises(fc.ExportError, match="is not the layer's: apart by up to"):
        fc.onnx.export(fc.Recurrent(cells.MGUCell(5, 7)))
