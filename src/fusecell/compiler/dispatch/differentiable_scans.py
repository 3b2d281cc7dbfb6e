"""Scans as functions of their tensors, to be differentiated: of a cell, and of one that carries tangents along.

Their tensors may be under transforms; what they are compiled from is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.dispatch.program_cache import TRAINABLE_STEPS
from fusecell.compiler.frontend import attributes
from fusecell.compiler.programs.forward_over_reverse import Dual, DualScan, without_tangent
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.second_order import checked
from fusecell.compiler.programs.tangent_step import TangentStep
from fusecell.compiler.programs.transformable import PureScan
from fusecell.compiler.refusal import Refusal
from fusecell.execution.context import recomputing
from fusecell.execution.options import Options, State
from fusecell.shapes import output_shape
from fusecell.torch_transforms import FunctorchLevel, below_functorch, outside_functorch

__all__ = ["Duals", "differentiable_scan", "dual_scan"]


def differentiable_scan(
    cell: Cell, inputs: State, states: int, options: Options, flags: Mapping[str, bool] | None = None
) -> PureScan | Refusal:
    """Return the scan of a cell and its gradient as a function of its tensors.

    Arguments:
        states: their number.
        flags: whether the gradient is needed of each input by its name, and of each weight by its path; where left out,
            of those that require one, at whatever level.
    """
    below = {path: below_functorch(value) for path, value in attributes(cell)}
    if flags is not None:
        below = {path: (value, flags.get(path, False)) for path, (value, _) in below.items()}
    with outside_functorch():
        weights = {path: value.detach().requires_grad_(flag) for path, (value, flag) in below.items()}
        plain = rebound(cell, weights, ())
        if isinstance(plain, TangentStep) and flags is not None:
            plain = plain.apart()
        step = TRAINABLE_STEPS.find(plain, inputs)
        if isinstance(plain, TangentStep) and not isinstance(step, Refusal):
            step = checked(step, plain, [tuple(value.shape[2:]) for value in inputs], step.traced.dtype)
    if isinstance(step, Refusal):
        return step
    traced = step.traced
    paths = traced.weights.direct_paths
    if not traced.is_plain or step.dtypes is not None or paths is None:
        return Refusal(
            ("A transform of torch.func is active, and the step computes with its weights alone, or draws.",)
        )
    if flags is None:
        needed = [below_functorch(value)[1] for value in (*inputs, *traced.weights.values(cell))]
    else:
        needed = [flags[name] for name in (*cell.inputs, *paths)]
    training = step.training(needed, bool(options.recompute or recomputing()))
    if isinstance(training, Refusal):
        return training
    return PureScan(step, training, plain, options, len(inputs), states)


@dataclass(frozen=True)
class Duals:
    """What a call reads below a jvp: its tensors, each with its tangent.

    Arguments:
        weights: by path.
    """

    inputs: list[Dual]
    state: list[Dual]
    weights: dict[str, Dual]

    @classmethod
    def of(cls, cell: Cell, inputs: State, state: State, level: FunctorchLevel | None) -> Duals:
        """Take a jvp, or a ``dual_level``, off the tensors of a call."""
        weights = {path: without_tangent(value, level) for path, value in attributes(cell)}
        of_inputs, of_state = ([without_tangent(value, level) for value in values] for values in (inputs, state))
        return cls(of_inputs, of_state, weights)

    def all(self) -> list[Dual]:
        """Return the inputs, first states and weights, one after the other."""
        return [*self.inputs, *self.state, *self.weights.values()]

    def step(self, cell: Cell, needed: Sequence[bool] = ()) -> tuple[TangentStep, State, State]:
        """Return the cell that carries the tangents along, its inputs and its first states.

        Arguments:
            needed: for each of :meth:`all` whether it has a tangent even where that is zero.
        """
        flags = list(needed or [False] * len(self.all()))
        of_inputs, of_weights = flags[: len(self.inputs)], flags[len(flags) - len(self.weights) :]
        moves = any(flag or tangent is not None for (_, tangent), flag in zip(self.inputs, of_inputs, strict=True))
        directions = {
            path: _or_zeros(dual)
            for (path, dual), flag in zip(self.weights.items(), of_weights, strict=True)
            if flag or dual[1] is not None
        }
        moving = [_or_zeros(dual) for dual in self.inputs if moves]
        plain = rebound(cell, {path: value for path, (value, _) in self.weights.items()}, ())
        step = TangentStep(plain, output_shape(cell.output_size), moves, directions, with_value=True)
        inputs = (*(value for value, _ in self.inputs), *moving)
        return step, inputs, (*(value for value, _ in self.state), *map(_or_zeros, self.state))


def _or_zeros(dual: Dual) -> Tensor:
    value, tangent = dual
    return torch.zeros_like(value) if tangent is None else tangent


def dual_scan(cell: Cell, duals: Duals, options: Options, needed: Sequence[bool]) -> tuple[DualScan, State] | Refusal:
    """Return the scan of a cell whose gradients have tangents, and its tensors.

    Arguments:
        needed: for each tensor of the cell, inputs, first states and weights, whether its gradient is.
    """
    step, inputs, state = duals.step(cell, needed)
    rows, states = len(duals.inputs), len(duals.state)
    of_inputs, of_weights = needed[:rows], dict(zip(duals.weights, needed[rows + states :], strict=True))
    flags = dict(zip(step.inputs, [*of_inputs, *of_inputs], strict=False))
    flags |= {f"cell.{path}": flag for path, flag in of_weights.items()}
    flags |= {step.direction_path(path): of_weights[path] for path in step.paths}
    scan = differentiable_scan(step, inputs, len(state), options, flags)
    if isinstance(scan, Refusal):
        return scan
    weights = scan.step.traced.weights
    start = len(inputs) + len(state)
    places = {path: place for place, path in enumerate(weights.direct_paths or (), start)}
    pairs: list[tuple[int | None, int | None]] = [
        (place, place + rows if step.of_inputs else None) for place in range(rows)
    ]
    pairs += [(place, place + states) for place in range(len(inputs), len(inputs) + states)]
    for path in duals.weights:
        tangent = places.get(step.direction_path(path)) if path in step.paths else None
        pairs.append((places.get(f"cell.{path}"), tangent))
    return DualScan(scan, step, tuple(pairs), tuple(needed)), (*inputs, *state, *weights.values(step))
