r"""Gradients that have tangents: a backward for dual numbers, as of a product with a Hessian, ``jvp(grad(f))``.

The cell that carries tangents along (`TangentStep`) has the outputs :math:`(y, \dot y)` of :math:`(x, \dot x)`. For the
cotangents :math:`\dot g` of y and g of :math:`\dot y` its gradients are

    of :math:`\dot x`   :math:`J^T g`, the gradient of x,
    of x                the tangent of that gradient, :math:`\dot g` being that of g.

So its forward and its backward kernel, once each, give values, gradients, and the tangents of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.programs.autograd import differentiated
from fusecell.compiler.programs.tangent_step import TangentStep
from fusecell.compiler.programs.transformable import PureScan, backward_of, forward_of
from fusecell.execution.options import State
from fusecell.torch_internals import apply_directly, forward_ad, has_gradient
from fusecell.torch_transforms import FunctorchLevel, apply_at_level, functorch_levels, in_forward_mode, innermost_level

__all__ = ["Dual", "DualScan", "Recorded", "run_at_level", "run_recorded", "with_tangent", "without_tangent"]

Dual = tuple[Tensor, Tensor | None]
"""A tensor and its tangent, None for zero."""
Grads = Sequence[Tensor | None]


def without_tangent(value: Tensor, level: FunctorchLevel | None) -> Dual:
    """Return what is below a jvp, or in a ``dual_level``, of a tensor and of its tangent."""
    if not has_gradient(value):
        return value if level is None else level.below(value), None
    primal, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]  # torch's
    if level is None:
        return primal, tangent
    return level.below(primal), None if tangent is None else level.below(tangent)


def with_tangent(primal: Tensor, tangent: Tensor, level: FunctorchLevel | None) -> Tensor:
    """Return a tensor with a tangent, as a jvp or a ``dual_level`` has it."""
    if level is not None:
        primal, tangent = level.above(primal), level.above(tangent)
    result: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]  # torch's
    return result


@dataclass(frozen=True)
class DualScan:
    """The scan of a cell with tangents.

    Arguments:
        scan: as a function of its tensors.
        step: the cell that it scans.
        pairs: for each tensor of the cell without tangents, inputs, first states and weights: where it and its tangent
            are among the scan's tensors, None where they are not.
        needed: for each of these whether its gradient is.
    """

    scan: PureScan
    step: TangentStep
    pairs: Sequence[tuple[int | None, int | None]]
    needed: Sequence[bool]

    def forward(self, tensors: State) -> tuple[Tensor, State, State]:
        """Return what the forward saves, the output and the last states, and their tangents."""
        saved, output, *after = forward_of(self.scan, tensors)
        value, rate = self.step.halves(output, 2)
        half = len(after) // 2
        return saved, (value, *after[:half]), (rate, *after[half:])

    def backward(self, saved: Tensor, tensors: State, of_values: Grads, of_rates: Grads) -> tuple[Grads, Grads]:
        """Return the gradients of the tensors without tangents, and those of their tangents.

        Arguments:
            of_values, of_rates: cotangents of what :meth:`forward` returns.
        """
        pairs = [pair for pair, flag in zip(self.pairs, self.needed, strict=True) if flag]
        places = sorted({place for pair in pairs for place in pair if place is not None})
        grads = [self._of_output(of_values[0], of_rates[0]), *of_values[1:], *of_rates[1:]]
        gradients = backward_of(self.scan, places, saved, tensors, grads)
        by_place: dict[int | None, Tensor | None] = dict(zip(places, gradients, strict=True))
        primal, tangent = zip(*[(by_place.get(i), by_place.get(j)) for i, j in self.pairs], strict=True)
        return primal, tangent

    def _of_output(self, of_value: Tensor | None, of_rate: Tensor | None) -> Tensor | None:
        """Return the cotangent of the two outputs that are one for kernels."""
        if of_value is None and of_rate is None:
            return None
        like: Any = of_rate if of_value is None else of_value
        both = [torch.zeros_like(like) if value is None else value for value in (of_value, of_rate)]
        return torch.stack(both, 2).reshape(*like.shape[:2], -1)


# Reverse mode of torch.func


@dataclass(frozen=True)
class Recorded:
    """A scan of dual numbers at the level of a grad, whose tensors are its own.

    Arguments:
        duals: the scan, and below the derivatives its tensors.
        loop: the Python loop as a function of the cell's tensors: inputs, first states and weights.
    """

    duals: DualScan
    tensors: State
    loop: Callable[[Sequence[Any]], State]


def run_at_level(recorded: Recorded, tensors: State) -> State:
    """Run a scan at the level of the innermost grad; return the output and the last states.

    Arguments:
        tensors: of the cell: inputs, first states and weights.
    """
    results: State = apply_at_level(_AtLevel, recorded, *tensors)
    return results


class _AtLevel(torch.autograd.Function):
    """The forward kernel of a cell with tangents, whose results are dual numbers."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, *tensors: Tensor) -> State:
        ctx.recorded = recorded
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        level = functorch_levels()[-1]
        with level.lower_recording():
            tangents = innermost_level()
            with nullcontext() if tangents is None else tangents.lower():
                ctx.saved, values, rates = recorded.duals.forward(recorded.tensors)
            results = [with_tangent(*pair, tangents) for pair in zip(values, rates, strict=True)]
        return tuple(map(level.above, results))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        recorded: Recorded = ctx.recorded
        tensors, needed, level = ctx.saved_tensors, ctx.needs_input_grad[1:], innermost_level()
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(tensors))
        leaves = [value for value, flag in zip(tensors, needed, strict=True) if flag]
        if level is None or not all(map(level.differentiates, leaves)):  # many backwards, or after the grad's end
            return None, *_gradients_of_loop(recorded.loop, tensors, needed, grads)
        of_level = [None if grad is None else level.wrapped(grad) for grad in grads]
        return None, *apply_at_level(_GradientsAtLevel, recorded, ctx.saved, *tensors, *of_level)


class _GradientsAtLevel(torch.autograd.Function):
    """The backward kernel of a cell with tangents, whose gradients are dual numbers."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, saved: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.recorded = recorded
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*values)
        duals, level = recorded.duals, functorch_levels()[-1]
        with level.lower_recording():
            tangents = innermost_level()
            grads = [
                (None, None) if grad is None else without_tangent(level.below(grad), tangents)
                for grad in values[len(duals.pairs) :]
            ]
            of_rates, of_values = zip(*grads, strict=True)
            with nullcontext() if tangents is None else tangents.lower():
                rates, gradients = duals.backward(saved, recorded.tensors, of_values, of_rates)
            results = [
                None if gradient is None or rate is None else with_tangent(gradient, rate, tangents)
                for gradient, rate in zip(gradients, rates, strict=True)
            ]
        return tuple([None if value is None else level.above(value) for value in results])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Compute the gradients' own gradients in the Python loop."""
        recorded: Recorded = ctx.recorded
        count = len(recorded.duals.pairs)

        def gradients(values: Sequence[Any]) -> list[Tensor | None]:
            return differentiated(recorded.loop, values[:count], recorded.duals.needed, values[count:])

        return None, None, *differentiated(gradients, ctx.saved_tensors, ctx.needs_input_grad[2:], cotangents)


def _gradients_of_loop(
    loop: Callable[[Sequence[Any]], State], tensors: Sequence[Any], needed: Sequence[bool], grads: Grads
) -> list[Tensor | None]:
    """Compute gradients by the Python loop, under whatever transforms are active."""
    places = [place for place, flag in enumerate(needed) if flag]

    def results(*values: Tensor) -> State:
        by_place = dict(zip(places, values, strict=True))
        return loop([by_place.get(place, value) for place, value in enumerate(tensors)])

    vjp: Any = torch.func.vjp
    outputs, pull_back = vjp(results, *[tensors[place] for place in places])
    cotangents = [torch.zeros_like(value) if grad is None else grad for value, grad in zip(outputs, grads, strict=True)]
    by_place: dict[int, Tensor] = dict(zip(places, pull_back(tuple(cotangents)), strict=True))
    return [by_place.get(place) for place in range(len(tensors))]


# torch's own autograd, in a dual_level


def run_recorded(duals: DualScan, tensors: State) -> tuple[State, State]:
    """Run a scan under torch's autograd; return the output and the last states, and their tangents.

    Arguments:
        tensors: of the scan.
    """
    results = _apply_recorded(duals, *tensors)
    half = len(results) // 2
    return results[:half], results[half:]


class _Recorded(torch.autograd.Function):
    """The forward kernel of a cell with tangents; in a ``dual_level`` its gradients have tangents too."""

    @staticmethod
    def forward(ctx: Any, duals: DualScan, *tensors: Tensor) -> State:
        saved, values, rates = duals.forward(tensors)
        ctx.duals = duals
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)
        # Not views of one tensor: autograd lets nobody change one of several views in place, as a layer does.
        return values[0].clone(), *values[1:], rates[0].clone(), *rates[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        duals: DualScan = ctx.duals
        saved, *tensors = ctx.saved_tensors
        result: list[Tensor | None] = [None] * len(tensors)
        half = len(grads) // 2
        of_values, of_rates = grads[:half], grads[half:]
        if in_forward_mode() and any(grad is not None for grad in of_values):
            parts = [(None, None) if grad is None else without_tangent(grad, None) for grad in of_values]
            primals, moves = zip(*parts, strict=True)
            rates, gradients = duals.backward(saved, tuple(tensors), moves, primals)
            for (place, _), gradient, rate in zip(duals.pairs, gradients, rates, strict=True):
                if place is not None and gradient is not None and rate is not None:
                    result[place] = with_tangent(gradient, rate, None)
            of_values = (None,) * half
        if any(grad is not None for grad in (*of_values, *of_rates)):
            of_primals, of_tangents = duals.backward(saved, tuple(tensors), of_values, of_rates)
            for places, gradients in zip(zip(*duals.pairs, strict=True), (of_primals, of_tangents), strict=True):
                _add(result, places, gradients)
        return None, *result


def _add(sums: list[Tensor | None], places: Sequence[int | None], gradients: Grads) -> None:
    for place, gradient in zip(places, gradients, strict=True):
        if place is not None and gradient is not None:
            before = sums[place]
            sums[place] = gradient if before is None else before + gradient


_apply_recorded: Any = apply_directly(_Recorded)
