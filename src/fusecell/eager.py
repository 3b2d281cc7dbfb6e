"""The eager runner: a Python loop over ``cell.step``, which defines every result and is the fallback."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.execution.options import Options, State, steps_of
from fusecell.execution.runners import register
from fusecell.shapes import (
    Outputs,
    feature_shape,
    is_size,
    map_outputs,
    output_shapes,
    size_text,
    tensors_of,
    zero_outputs,
)
from fusecell.validation import first_state

__all__ = ["checked_output", "run_eager"]


def run_eager(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Outputs, State]:
    """Run a cell over a sequence in a Python loop.

    Arguments:
        inputs: (T, N, ...) each, or (1, N, ...) for one that is constant over time.
        state: (N, size) each.
        options: see :class:`fusecell.execution.options.Options`.

    Returns:
        The outputs (T, N, output_size), in the order of the inputs and zero beyond a row's length, and the state after
        each row's last valid step. All are new tensors that share no memory.
    """
    steps = steps_of(inputs)
    if steps == 0:
        return _empty(cell, inputs, state), tuple(value.clone() for value in state)
    streams = [value.unbind(0) if value.shape[0] == steps else repeat(value[0], steps) for value in inputs]
    rows = list(zip(*streams, strict=True))
    order = range(steps - 1, -1, -1) if options.reverse else range(steps)
    valid, resets, start = _row_masks(cell, steps, state, options)
    outputs: list[Outputs] = [inputs[0]] * steps
    for t in order:
        x = rows[t]
        before = state
        if valid is not None:
            # A step on padding that holds NaN or inf would put NaN into the gradients of the weights.
            x = tuple(_select(valid[t], value, torch.zeros_like(value)) for value in x)
        if resets is not None:
            state = tuple(_select(resets[t], *pair) for pair in zip(start, state, strict=True))
        output, state = _checked_step(cell, x, state)
        if valid is not None:
            output = map_outputs(partial(_or_zero, valid[t]), output)
            state = tuple(_select(valid[t], *pair) for pair in zip(state, before, strict=True))
        outputs[t] = output
    # Cloned: a step may return its state unchanged, and results never share memory with arguments.
    stacked = map_outputs(lambda *values: torch.stack(values), *outputs)
    return stacked, tuple(value.clone() for value in state)


def _checked_step(cell: Cell, x: State, state: State) -> tuple[Outputs, State]:
    """Call ``cell.step`` and check that its result has the types, shapes and dtypes the cell declares."""
    result: object = cell.step(x if len(cell.inputs) > 1 else x[0], state)
    name, n = type(cell).__name__, state[0].shape[0] if state else x[0].shape[0]
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple | list)):
        raise TypeError(f"{name}.step must return (output, state) with state a tuple, got {_describe(result)}.")
    output, after = result[0], tuple(result[1])
    sizes = cell.state_sizes
    if len(after) != len(sizes):
        raise ValueError(f"{name}.step returned {len(after)} states, expected {len(sizes)} ({', '.join(cell.states)}).")
    output = checked_output(cell, output, n)
    for label, size, old, new in zip(cell.states, sizes, state, after, strict=True):
        if not isinstance(new, Tensor):
            raise TypeError(
                f"{name}.step returned {_describe(new)} as state {label}, expected a tensor of shape "
                f"{size_text(size, n)}. What is the same for all rows is kept as one number for each, (N, 1)."
            )
        if tuple(new.shape) != (n, *feature_shape(size)):
            raise ValueError(
                f"{name}.step returned state {label} of shape {tuple(new.shape)}, expected {size_text(size, n)}. "
                "If a state is not hidden_size wide, set self.state_sizes."
            )
        if new.dtype != old.dtype:
            raise ValueError(
                f"{name}.step turned state {label} from {old.dtype} into {new.dtype}. A state keeps its dtype: "
                f"convert it in step with .to({old.dtype})."
            )
    return output, after


def checked_output(cell: Cell, output: Outputs, rows: int | None) -> Outputs:
    """Check the structure of a step's output, and its shapes for so many rows; return a dict in the declared order.

    Raises:
        TypeError: for another structure than ``output_size`` declares.
        ValueError: for another shape; not where ``rows`` is None.
    """
    name, size = type(cell).__name__, cell.output_size
    shapes = output_shapes(size)
    if is_size(size):
        fits = isinstance(output, Tensor)
        expected = "a tensor"
    elif isinstance(size, Mapping):
        fits = isinstance(output, Mapping) and output.keys() == size.keys()
        expected = f"a dict of {', '.join(map(repr, size))}"
        output = {key: output[key] for key in size} if fits else output
    else:
        fits = isinstance(output, tuple | list) and len(output) == len(size)
        expected = f"a tuple of {len(size)} tensors"
    if not fits:
        kind = f"dict of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else _describe(output)
        raise TypeError(
            f"{name}.step returned {kind} as its output, expected {expected}, as output_size says. Set "
            "self.output_size to a dict or a tuple of sizes where step returns a dict or a tuple of tensors."
        )
    for (label, shape), value in zip(shapes.items(), tensors_of(output), strict=True):
        if rows is not None and tuple(value.shape) != (rows, *shape):
            what = "an output" if label == "output" else label
            raise ValueError(
                f"{name}.step returned {what} of shape {tuple(value.shape)}, expected {size_text(shape, rows)}. "
                "If the output is not as wide as the state, set self.output_size."
            )
    return output


def _row_masks(cell: Cell, steps: int, state: State, options: Options) -> tuple[Tensor | None, Tensor | None, State]:
    """Return the masks of valid and of reset rows, each (T, N) or None, and the state that a reset goes back to."""
    valid, resets, start = None, options.resets, state
    if options.lengths is not None:
        valid = torch.arange(steps, device=options.lengths.device)[:, None] < options.lengths
    if resets is not None:
        if state:
            like = state[0]
            start = first_state(cell, like.shape[0], dtype=like.dtype, device=like.device)
        if valid is not None:
            resets = resets & valid  # a reset in the padding would wipe out a row's final state
    return valid, resets, start


def _select(rows: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Return ``value`` in rows whose flag is set and ``other`` in the rest."""
    # Not value * flag: padding may hold NaN, and 0 * NaN is NaN.
    return torch.where(rows.reshape(-1, *[1] * (value.dim() - 1)), value, other)


def _or_zero(rows: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` in rows whose flag is set and zero in the rest."""
    return _select(rows, value, torch.zeros_like(value))


def _empty(cell: Cell, inputs: State, state: State) -> Outputs:
    like = state[0] if state else inputs[0]
    return zero_outputs(cell.output_size, like.new_zeros, 0, inputs[0].shape[1])


def _describe(result: object) -> str:
    if isinstance(result, tuple):
        return "(" + ", ".join(type(value).__name__ for value in result) + ")"
    return type(result).__name__


register("eager", run_eager)
