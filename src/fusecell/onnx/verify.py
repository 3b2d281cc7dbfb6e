"""Compare an exported model with the layer that it was made of, on random sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.errors import ExportError
from fusecell.layers import Sequential, scan
from fusecell.layers.sequential import is_recurrent
from fusecell.onnx.model import is_batch_first
from fusecell.shapes import Shape, feature_shape, tensors_of
from fusecell.validation import first_state

__all__ = ["can_verify", "runner_of", "verify_model"]

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], list[Array]]
_SIZES = ((5, 3), (2, 1))
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def can_verify(model: onnx.ModelProto) -> bool:
    """Whether something that is installed runs all of a model: onnx's reference knows no lengths and one direction."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return not {"GRU", "LSTM", "RNN"} & {node.op_type for node in model.graph.node}
    return True


def runner_of(model: onnx.ModelProto) -> tuple[Run, str]:
    """Return what runs a model, and its name: ONNX Runtime, or onnx's reference where that lacks something."""
    try:
        import onnxruntime as runtime
    except ImportError:
        pass
    else:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        with suppress(Exception):  # of a model of doubles, for which it has few operators
            session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return lambda feeds: session.run(None, dict(feeds)), "ONNX Runtime"
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(model)
    return lambda feeds: reference.run(None, dict(feeds)), "onnx.reference"  # type: ignore[return-value]


def verify_model(
    model: onnx.ModelProto,
    module: nn.Module,
    cells: Sequence[Cell],
    dtype: torch.dtype,
    *,
    step: bool,
    input_dtype: torch.dtype | None,
    shapes: Sequence[Shape] | None,
) -> None:
    """Run a model and the layer on the same random numbers.

    Raises:
        ExportError: where a result differs by more than rounding.
    """
    run, runtime = runner_of(model)
    generator = torch.Generator().manual_seed(0)
    names = [value.name for value in model.graph.input]
    for steps, rows in _SIZES:
        inputs = {
            name: _random((1 if step else steps, rows, *shape), input_dtype or dtype, generator)
            for name, shape in zip(names, shapes or [feature_shape(cells[0].input_size)], strict=False)
        }
        _draw_once(cells[0], inputs, dtype)
        options: dict[str, Tensor] = {}
        if "lengths" in names:
            options["lengths"] = torch.tensor([steps, 1, steps - 1][:rows])
        if "resets" in names:
            options["resets"] = torch.rand(steps, rows, generator=generator) < 0.3
        batch_first = is_batch_first(module) and not step
        # As the module takes them; the model takes one step without its dimension.
        inputs = {name: value.transpose(0, 1) if batch_first else value for name, value in inputs.items()}
        feeds = {name: (value[0] if step else value).numpy() for name, value in inputs.items()}
        feeds.update({name: value.numpy() for name, value in options.items()})
        starts = [value for cell in cells for value in first_state(cell, rows, dtype=dtype, device="cpu")]
        feeds.update(
            zip([name for name in names if name not in feeds], [value.numpy() for value in starts], strict=False)
        )
        try:
            results = run(feeds)
        except Exception as error:  # of an operator that it lacks, whatever it raises then
            raise ExportError(
                f"onnx.export can't verify the model: {runtime} says: {error}. Install onnxruntime, or pass "
                "verify=False."
            ) from error
        x = tuple(inputs.values())[: len(inputs) - len(cells[0].draw(1, 1))]
        expected = _results(module, x if len(x) > 1 else x[0], options, step)
        for value, actual, wanted in zip(model.graph.output, results, expected, strict=False):
            _compare(value.name, actual, wanted.numpy(), _TOLERANCES[dtype], runtime)


def _draw_once(cell: Cell, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Draw what a cell draws, as inputs of the model, and let the cell draw the same."""
    x = next(iter(inputs.values()))
    with torch.random.fork_rng(devices=()):
        drawn = type(cell).draw(cell, x.shape[0], x.shape[1], dtype=dtype)
    if drawn:
        inputs.update(zip(cell.inputs[-len(drawn) :], drawn, strict=True))
        cell.__dict__["draw"] = lambda *args, **options: drawn


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


def _results(module: nn.Module, x: Any, options: Mapping[str, Tensor], step: bool) -> list[Tensor]:
    """Return a layer's outputs, and its states in the order of the model's."""
    if isinstance(module, Cell):
        y, state = scan(module, x, **options)  # type: ignore[arg-type]
        after: list[Any] = [state] if isinstance(state, Tensor) else list(state)
    elif type(module) is nn.Sequential:
        y, after = x, []
        for part in module:
            result = part(y)
            y, state = result if isinstance(result, tuple) else (result, None)
            after += _flat(part, state)
    else:
        y, state = module(x, **options)
        after = _flat(module, state)
    outputs = [value.squeeze(0) if step else value for value in tensors_of(y)]
    return [*outputs, *after]


def _flat(module: nn.Module, state: Any) -> list[Tensor]:
    """Return the states of a layer in the order of a model's: cell by cell."""
    if state is None:
        return []
    if isinstance(module, GRU | RNN):
        return list(state)
    if isinstance(module, LSTM):
        return [part for pair in zip(*state, strict=True) for part in pair]
    if isinstance(state, Tensor):
        return [state]
    if isinstance(module, Sequential):
        recurrent = [part for part in module if is_recurrent(part)]
        return [value for part, each in zip(recurrent, state, strict=True) for value in _flat(part, each)]
    return [value for each in state for value in _flat(module, each)]
