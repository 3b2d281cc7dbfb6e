"""Calls under torch.func and with dual numbers: one transform after the other is taken off, down to plain calls.

    vmap over inputs        one call, in which the members are further rows
    vmap over weights       a call for each member
    jvp, dual numbers       a call of a cell that carries tangents along, `TangentStep`
    grad, vjp               Functions around the kernels, which torch.func takes apart itself (`programs.transformable`)
    grad inside of a jvp    one Function for both, whose gradients have tangents (`programs.forward_over_reverse`)

What is differentiated more often, what draws, and what is reset runs as the Python loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusecell.attribute_paths import getter
from fusecell.cell import Cell
from fusecell.compiler.dispatch.differentiable_scans import Duals, differentiable_scan, dual_scan
from fusecell.compiler.dispatch.eligibility import needs_gradient, tensor_reasons
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.frontend import attributes
from fusecell.compiler.frontend.dtypes import has_16_bits
from fusecell.compiler.programs.autograd import TrainableStep
from fusecell.compiler.programs.ensemble import Ensemble
from fusecell.compiler.programs.forward_over_reverse import Dual, Recorded, run_at_level, run_recorded, with_tangent
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.second_order import checked
from fusecell.compiler.programs.tangent_step import TangentStep
from fusecell.compiler.programs.transformable import PureScan, pure_scan
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.execution.context import recomputing
from fusecell.execution.options import Options, State
from fusecell.shapes import Outputs, is_size, map_outputs, packed, unpacked
from fusecell.torch_internals import in_dispatch_mode
from fusecell.torch_transforms import (
    FunctorchLevel,
    common_to_members,
    functorch_levels,
    in_forward_mode,
    innermost_level,
    is_wrapped,
)

__all__ = ["run_transformed"]

Result = tuple[Outputs, State] | Refusal
_IN_DISPATCH_MODE = ("A dispatch mode is active.",)


def run_transformed(cell: Cell, inputs: State, state: State, options: Options) -> Result:
    """Run a call under transforms of torch.func or in a ``dual_level``.

    Returns:
        The outputs and the state after the last step; or the reason why the call runs as a Python loop.
    """
    kinds = [level.kind for level in functorch_levels()]
    is_dual = in_forward_mode() and "Jvp" not in kinds
    if "Functionalize" in kinds or not _has_kernels((["Jvp"] if is_dual else []) + kinds):
        return Refusal(("Transforms of torch.func differentiate three times, or map between two derivatives.",))
    if options.resets is not None:
        return Refusal(("A transform of torch.func is active, and rows are reset.",))
    if 0 in inputs[0].shape[:2]:
        return Refusal(("A transform of torch.func is active, and there are no steps, or no rows.",))
    if options.lengths is not None:
        lengths = common_to_members(options.lengths)
        if lengths is None:
            return Refusal(("Each member of a vmap has lengths of its own.",))
        options = replace(options, lengths=lengths)
    if not all(value.is_floating_point() for value in (*inputs, *state)) or has_16_bits(inputs[0].dtype):
        return Refusal(("A transform of torch.func is active, and not all is float32 or float64.",))
    return _run(cell, inputs, state, options, is_dual)


def _has_kernels(kinds: Sequence[str]) -> bool:
    """Whether there are kernels for these transforms, the innermost last."""
    derivatives = [kind for kind in kinds if kind != "Vmap"]
    if derivatives == ["Jvp", "Grad"]:  # one Function for both: nothing may be between them
        return kinds.index("Grad") == kinds.index("Jvp") + 1
    return len(derivatives) < 2 or derivatives in (["Grad", "Jvp"], ["Grad", "Grad"])


def _run(cell: Cell, inputs: State, state: State, options: Options, is_dual: bool) -> Result:
    """Take off the innermost transform that is left, and run what is below it."""
    levels = functorch_levels()
    if not levels:
        if is_dual:
            return _with_tangents(cell, inputs, state, options, None)
        return _run_plain(cell, inputs, state, options)
    level = levels[-1]
    if level.kind == "Vmap":
        return _mapped(cell, inputs, state, options, level, is_dual)
    if level.kind == "Jvp":
        return _with_tangents(cell, inputs, state, options, level)
    if is_dual or "Jvp" in [below.kind for below in levels]:
        return _with_gradients_and_tangents(cell, inputs, state, options, level)
    return _with_gradients(cell, inputs, state, options)


# vmap


def _mapped(cell: Cell, inputs: State, state: State, options: Options, level: FunctorchLevel, is_dual: bool) -> Result:
    """Run the members of a vmap."""
    of_inputs, of_state = [level.members(value) for value in inputs], [level.members(value) for value in state]
    of_weights = {path: level.members(value) for path, value in attributes(cell) if is_wrapped(value)}
    with level.lower():
        plain = rebound(cell, {path: value for path, (value, _) in of_weights.items()}, ())
        if all(dim is None for _, dim in (*of_inputs, *of_state, *of_weights.values())):  # one result for all members
            return _run(plain, _values(of_inputs), _values(of_state), options, is_dual)
        if all(dim is None for _, dim in of_weights.values()):
            result = _members_as_rows(plain, of_inputs, of_state, options, level.size, is_dual)
        else:
            result = _member_by_member(plain, of_inputs, of_state, of_weights, options, level.size, is_dual)
    if isinstance(result, Refusal):
        return result
    (outputs, output_dim), (after, state_dim) = result
    wrapped = map_outputs(lambda value: level.of_members(value, output_dim), outputs)
    return wrapped, tuple([level.of_members(value, state_dim) for value in after])


def _values(members: Members) -> State:
    return tuple([value for value, _ in members])


Members = list[tuple[Tensor, int | None]]
"""Tensors, each with the dimension that members are along, None where they have it in common."""
MappedResult = tuple[tuple[Outputs, int], tuple[State, int]] | Refusal
"""Outputs and states, each with the dimension that their members are along."""


def _members_as_rows(
    cell: Cell, inputs: Members, state: Members, options: Options, size: int, is_dual: bool
) -> MappedResult:
    """Run all members as rows of one call: row n of member m is row m N + n."""

    def as_rows(value: Tensor, dim: int | None, rows: int) -> Tensor:
        if dim is None:
            spread = value.unsqueeze(rows).expand(*value.shape[:rows], size, *value.shape[rows:])
        else:
            spread = value.movedim(dim, rows)
        return spread.flatten(rows, rows + 1)

    if options.lengths is not None:
        options = replace(options, lengths=options.lengths.repeat(size))
    rows_of_inputs = tuple([as_rows(*each, 1) for each in inputs])
    result = _run(cell, rows_of_inputs, tuple([as_rows(*each, 0) for each in state]), options, is_dual)
    if isinstance(result, Refusal):
        return result
    outputs, after = result

    def unflatten(value: Tensor, rows: int) -> Tensor:
        return value.reshape(*value.shape[:rows], size, -1, *value.shape[rows + 1 :])

    return (map_outputs(lambda value: unflatten(value, 1), outputs), 1), (
        tuple([unflatten(value, 0) for value in after]),
        0,
    )


def _member_by_member(
    cell: Cell,
    inputs: Members,
    state: Members,
    weights: Mapping[str, tuple[Tensor, int | None]],
    options: Options,
    size: int,
    is_dual: bool,
) -> MappedResult:
    """Run a call for each member, with its weights."""

    def by_member(tensors: Members) -> list[State]:
        each = [[value] * size if dim is None else value.unbind(dim) for value, dim in tensors]
        return list(zip(*each, strict=True)) or [()] * size

    if not is_dual and not functorch_levels():
        together = _ensemble(cell, inputs, state, weights, options, size)
        if together is not None:
            return together
    paths = [path for path, (_, dim) in weights.items() if dim is not None]
    own = [dict(zip(paths, values, strict=True)) for values in by_member([weights[path] for path in paths])]
    members = zip([rebound(cell, each, ()) for each in own], by_member(inputs), by_member(state), strict=True)
    results = []
    for member, member_inputs, member_state in members:
        result = _run(member, member_inputs, member_state, options, is_dual)
        if isinstance(result, Refusal):
            return result
        results.append(result)
    first, *others = [outputs for outputs, _ in results]
    outputs = map_outputs(lambda *values: torch.stack(values), first, *others)
    return (outputs, 0), (tuple([torch.stack(each) for each in zip(*(after for _, after in results), strict=True)]), 0)


def _ensemble(
    cell: Cell,
    inputs: Members,
    state: Members,
    weights: Mapping[str, tuple[Tensor, int | None]],
    options: Options,
    size: int,
) -> MappedResult | None:
    """Run all members side by side, where their weights are attributes of the cell unchanged; else return None."""

    def first(value: Tensor, dim: int | None) -> Tensor:
        # A leaf: a view of a parameter that is made without gradients requires one, and can't have it.
        return value if dim is None else value.detach().select(dim, 0).requires_grad_(value.requires_grad)

    one = rebound(cell, {path: first(*each) for path, each in weights.items()}, ())
    of_one = tuple([first(*each) for each in (*inputs, *state)])
    if size == 1 or tensor_reasons(of_one) or in_dispatch_mode():
        return None
    step = TRAINABLE_STEPS.find(one, of_one[: len(inputs)])
    if isinstance(step, Refusal) or not step.traced.is_plain or step.traced.weights.direct_paths is None:
        return None
    leaves = [weights.get(path) or (getter(path)(one), None) for path in step.traced.weights.direct_paths]
    recording, recompute = torch.is_grad_enabled(), bool(options.recompute or recomputing())
    training = step.training([recording and value.requires_grad for value, _ in (*inputs, *leaves)], recompute)
    if isinstance(training, Refusal):
        return None
    tensors = [*inputs, *state, *leaves]
    scan = PureScan(step, training, one, options, len(inputs), len(state))
    ensemble = Ensemble(scan, size, tuple([dim is not None for _, dim in tensors]))
    output, after = ensemble(tuple([value if dim is None else value.movedim(dim, 0) for value, dim in tensors]))
    return (unpacked(cell.output_size, output, 3), 0), (after, 0)


# Derivatives


def _with_tangents(cell: Cell, inputs: State, state: State, options: Options, level: FunctorchLevel | None) -> Result:
    """Run a cell and its tangents as one scan.

    Arguments:
        level: the jvp of torch.func; None in a ``dual_level`` outside of it.
    """
    duals = Duals.of(cell, inputs, state, level)
    if level is not None:
        with level.lower():
            result = _pushed_forward(cell, duals, options)
    elif torch.is_grad_enabled() and any(map(_requires_grad, duals.all())):
        result = _recorded(cell, duals, options)
    else:
        result = _pushed_forward(cell, duals, options)
    if isinstance(result, Refusal):
        return result
    (values, tangents), after = result
    count = len(state)
    states = tuple([with_tangent(*pair, level) for pair in zip(after[:count], after[count:], strict=True)])
    return map_outputs(lambda value, rate: with_tangent(value, rate, level), values, tangents), states


def _pushed_forward(cell: Cell, duals: Duals, options: Options) -> Result:
    """Run the scan that carries tangents along.

    Returns:
        The outputs and their tangents as a pair, and the states and their tangents one after the other.
    """
    step, inputs, state = duals.step(cell)
    result = _run(step, inputs, state, options, False)
    if isinstance(result, Refusal):
        return result
    outputs, after = result
    return tuple([unpacked(cell.output_size, outputs[name], 2) for name in TangentStep.outputs]), after


def _recorded(cell: Cell, duals: Duals, options: Options) -> Result:
    """Run the scan that carries tangents along under torch's autograd, whose gradients have tangents too.

    Returns:
        As of :func:`_pushed_forward`.
    """
    reasons = tensor_reasons(tuple([value for value, _ in (*duals.inputs, *duals.state)]))
    if reasons or in_dispatch_mode():
        return Refusal(reasons or _IN_DISPATCH_MODE)
    scan = dual_scan(cell, duals, options, list(map(_requires_grad, duals.all())))
    if isinstance(scan, Refusal):
        return scan
    (output, *after), (rate, *rates) = run_recorded(*scan)
    return tuple([unpacked(cell.output_size, value, 2) for value in (output, rate)]), (*after, *rates)


def _requires_grad(dual: Dual) -> bool:
    return any(value is not None and value.requires_grad for value in dual)


def _with_gradients(cell: Cell, inputs: State, state: State, options: Options) -> Result:
    """Run the kernels of forward and backward under a grad, and whatever vmap is below it."""
    scan = differentiable_scan(cell, inputs, len(state), options)
    if isinstance(scan, Refusal):
        return scan
    output, *after = pure_scan(scan, *inputs, *state, *scan.step.traced.weights.values(cell))
    return unpacked(cell.output_size, output, 2), tuple(after)


def _with_gradients_and_tangents(
    cell: Cell, inputs: State, state: State, options: Options, level: FunctorchLevel
) -> Result:
    """Run the kernels of forward and backward of a cell with tangents, under a grad and the jvp that it is in."""
    weights = dict(attributes(cell))
    tensors = tuple(map(level.wrapped, (*inputs, *state, *weights.values())))
    needed = [level.differentiates(value) for value in tensors]
    with level.lower():
        of_inputs, of_state = (tuple(map(level.below, values)) for values in (inputs, state))
        plain = rebound(cell, {path: level.below(value) for path, value in weights.items()}, ())
        tangents = innermost_level()
        duals = Duals.of(plain, of_inputs, of_state, tangents)
        with nullcontext() if tangents is None else tangents.lower():
            scan = dual_scan(plain, duals, options, needed)
    if isinstance(scan, Refusal):
        return scan

    def loop(values: Sequence[Any]) -> State:
        first, second = len(inputs), len(inputs) + len(state)
        other = rebound(cell, dict(zip(weights, values[second:], strict=True)), ())
        output, after = run_eager(other, tuple(values[:first]), tuple(values[first:second]), options)
        return packed(output, 2), *after

    output, *after = run_at_level(Recorded(*scan, loop), tensors)
    return unpacked(cell.output_size, output, 2), tuple(after)


# No transform is left


def _run_plain(cell: Cell, inputs: State, state: State, options: Options) -> Result:
    """Run machine code on plain tensors."""
    reasons = tensor_reasons((*inputs, *state))
    if reasons or in_dispatch_mode():
        return Refusal(reasons or _IN_DISPATCH_MODE)
    find: Callable[..., Any] = (TRAINABLE_STEPS if needs_gradient(cell, (*inputs, *state)) else PROGRAMS).find
    program = find(cell, inputs)
    if isinstance(cell, TangentStep) and isinstance(program, TrainableStep):
        program = checked(program, cell, [tuple(value.shape[2:]) for value in inputs], program.traced.dtype)
    if isinstance(program, Refusal):
        return program
    if program.traced.draws or program.traced.leftovers:
        return Refusal(("A transform of torch.func is active, and the step draws, or leaves tensors on its module.",))
    result: Result = program(cell, inputs, state, options)
    size = cell.output_size
    if isinstance(result, Refusal) or is_size(size):
        return result
    if isinstance(cell, TangentStep):  # halves of one memory: dual numbers are made of them at once
        return dict(zip(size, cell.halves(result[0], 2), strict=True)), result[1]
    return unpacked(size, result[0], 2), result[1]
