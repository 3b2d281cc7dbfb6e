"""Compare an exported model with the layer that it was made of, on random sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.errors import ExportError
from fusecell.layers import Bidirectional, Sequential, scan
from fusecell.layers.sequential import is_recurrent
from fusecell.onnx.model import Form, cells_of
from fusecell.shapes import tensors_of
from fusecell.validation import first_state

__all__ = ["can_verify", "runner_of", "verify_model"]

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], list[Array]]
_SIZES = ((5, 3), (2, 3), (5, 1), (2, 1))
"""Steps and rows."""
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def can_verify(model: onnx.ModelProto) -> bool:
    """Whether something that is installed runs all of a model: onnx's reference knows no lengths and one direction."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return not {"GRU", "LSTM", "RNN"} & {node.op_type for node in model.graph.node}
    return True


def runner_of(model: onnx.ModelProto, dtype: torch.dtype = torch.float32) -> tuple[Run, str]:
    """Return what runs a model, and its name: ONNX Runtime, or onnx's reference, which has all operators in doubles."""
    try:
        import onnxruntime as runtime
    except ImportError:
        pass
    else:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if dtype != torch.float64:
            session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return lambda feeds: session.run(None, dict(feeds)), "ONNX Runtime"
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(model)
    return lambda feeds: reference.run(None, dict(feeds)), "onnx.reference"  # type: ignore[return-value]  # too wide


def verify_model(model: onnx.ModelProto, module: nn.Module, cells: Sequence[Cell], form: Form) -> None:
    """Run a model and the layer on the same random numbers: sequences, states, lengths with one of 0, resets.

    Raises:
        ExportError: where a result differs by more than rounding.
    """
    try:
        run, runtime = runner_of(model, form.dtype)
    except Exception as error:  # of an operator that it lacks, whatever it raises then
        raise _cannot_verify("ONNX Runtime", error) from error
    for steps, rows in _SIZES:
        trial = _trial(module, cells, form, 1 if form.step else steps, rows)
        feeds = dict(zip([value.name for value in model.graph.input], trial.feeds(form), strict=True))
        try:
            results = run(feeds)
        except Exception as error:
            raise _cannot_verify(runtime, error) from error
        expected = _results(module, trial, form)
        for value, actual, by_layer in zip(model.graph.output, results, expected, strict=True):
            _compare(value.name, actual, by_layer.numpy(), _TOLERANCES[form.dtype], runtime)


def _cannot_verify(runtime: str, error: Exception) -> ExportError:
    return ExportError(
        f"onnx.export can't verify the model: {runtime} says: {error}. Install onnxruntime, or pass verify=False."
    )


@dataclass
class _Trial:
    """Random numbers for a model and its layer, as the layer takes them.

    Attributes:
        inputs: of the first cell, sequences.
        drawn: what that cell draws, which the model has as inputs behind the others.
        options: lengths and resets.
        states: of all cells, one after the other.
    """

    inputs: list[Tensor]
    drawn: list[Tensor]
    options: dict[str, Tensor]
    states: list[Tensor]

    def feeds(self, form: Form) -> list[Array]:
        """Return all as the model takes them: one step without its dimension."""
        drawn = [value.transpose(0, 1) if form.batch_first else value for value in self.drawn]
        inputs = [value[0] if form.step else value for value in (*self.inputs, *drawn)]
        states = self.states if form.states else []
        return [value.numpy() for value in (*inputs, *self.options.values(), *states)]


def _trial(module: nn.Module, cells: Sequence[Cell], form: Form, steps: int, rows: int) -> _Trial:
    generator = torch.Generator().manual_seed(steps + rows)
    lead = (rows, steps) if form.batch_first else (steps, rows)
    drawn = _draw_once(cells[0], steps, rows, form.dtype)
    shapes = form.input_shapes[: len(form.input_shapes) - len(drawn)]
    dtypes = form.input_dtypes[: len(shapes)]
    inputs = [_random((*lead, *shape), dtype, generator) for shape, dtype in zip(shapes, dtypes, strict=True)]
    options = {}
    if form.lengths:
        options["lengths"] = torch.tensor([steps, 0, steps - 1][:rows] if rows > 1 else [steps - 1])
    if form.resets:
        options["resets"] = torch.rand(lead, generator=generator) < 0.3
    states = [value for cell in cells for value in first_state(cell, rows, dtype=form.dtype, device="cpu")]
    if form.states:
        states = [value + 0.5 * _random(value.shape, form.dtype, generator) for value in states]
    return _Trial(inputs, drawn, options, states)


def _draw_once(cell: Cell, steps: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Draw what a cell draws, as inputs of the model, and let the cell draw the same."""
    with torch.random.fork_rng(devices=()):
        drawn = type(cell).draw(cell, steps, rows, dtype=dtype)
    if drawn:
        cell.__dict__["draw"] = lambda *args, **options: drawn
    return [value.expand(steps, *value.shape[1:]) for value in drawn]


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=dtype)


def _compare(name: str, actual: Array, expected: Array, tolerance: float, runtime: str) -> None:
    if actual.shape != expected.shape or not np.allclose(actual, expected, tolerance, tolerance, equal_nan=True):
        apart = f"shape {actual.shape}, expected {expected.shape}"
        if actual.shape == expected.shape:
            apart = f"apart by up to {np.abs(actual - expected).max():.1e}"
        raise ExportError(
            f"onnx.export: {name} of the model, run by {runtime}, is not the layer's: {apart}. Please report this with "
            "the cell; verify=False writes the model all the same."
        )


def _results(module: nn.Module, trial: _Trial, form: Form) -> list[Tensor]:
    """Return a layer's outputs, and its states in the order of the model's."""
    x = tuple(trial.inputs) if len(trial.inputs) > 1 else trial.inputs[0]
    states = iter(trial.states)
    if isinstance(module, Cell):
        y, state = scan(module, x, _state_of(module, states), **trial.options)  # type: ignore[arg-type]  # Any
        after = _flat(module, state)
    elif type(module) is nn.Sequential:
        y, after = x, []
        for part in module:
            if cells_of(part):
                y, state = part(y, _state_of(part, states), **trial.options)
                after += _flat(part, state)
            else:
                y = part(y)
    else:
        y, state = module(x, _state_of(module, states), **trial.options)
        after = _flat(module, state)
    outputs = [value.squeeze(0) if form.step else value for value in tensors_of(y)]
    return [*outputs, *after] if form.states else outputs


def _state_of(module: nn.Module, states: Iterator[Tensor]) -> Any:
    """Return a layer's state, as it takes one, of the states of its cells, one after the other."""
    if isinstance(module, Sequential):
        return tuple(_state_of(part, states) for part in module if is_recurrent(part))
    if isinstance(module, Bidirectional):
        return _state_of(module.forward_layer, states), _state_of(module.backward_layer, states)
    if isinstance(module, GRU | LSTM | RNN):
        parts = [[next(states) for _ in cell.states] for *_, cell in module.leaf_cells()]
        stacked = tuple(torch.stack(values) for values in zip(*parts, strict=True))
        return stacked if isinstance(module, LSTM) else stacked[0]
    (cell,) = cells_of(module)
    values = tuple(next(states) for _ in cell.states)
    return values[0] if len(values) == 1 else values


def _flat(module: nn.Module, state: Any) -> list[Tensor]:
    """Return the states of a layer in the order of a model's: cell by cell."""
    if isinstance(module, Sequential):
        recurrent = [part for part in module if is_recurrent(part)]
        return [value for part, each in zip(recurrent, state, strict=True) for value in _flat(part, each)]
    if isinstance(module, Bidirectional):
        return [*_flat(module.forward_layer, state[0]), *_flat(module.backward_layer, state[1])]
    if isinstance(module, LSTM):
        return [part for pair in zip(*state, strict=True) for part in pair]
    return [state] if isinstance(state, Tensor) and not isinstance(module, GRU | RNN) else list(state)
