"""Several cells alike over sequences alike, side by side: an ensemble, whose members have weights of their own.

The members' kernels run at the same time, each on one thread. One autograd Function holds them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.programs.autograd import differentiated
from fusecell.compiler.programs.training import Call, Gradients, Results
from fusecell.compiler.programs.transformable import PureScan
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import State

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble:
    """The scans of some members.

    Arguments:
        scan: that of each member.
        size: how many members there are, two or more.
        own: for each tensor of a scan, an input, a first state or a weight, whether each member has its own: that of
            the ensemble is then (members, ...).
    """

    scan: PureScan
    size: int
    own: tuple[bool, ...]

    def __call__(self, tensors: State) -> tuple[Tensor, State]:
        """Run all members; return their outputs, (members, T, N, ...), and their last states, (members, N, ...)."""
        apply: Any = _Members.apply
        output, *after = apply(self, *tensors)
        return output, tuple(after)

    def member(self, place: int, tensors: Sequence[Any]) -> State:
        """Return the tensors of one member."""
        return tuple([value[place] if own else value for value, own in zip(tensors, self.own, strict=True)])

    def eager(self, tensors: Sequence[Any]) -> State:
        """Run the Python loop of each member."""
        results = [self.scan.eager(self.member(place, tensors)) for place in range(self.size)]
        return tuple([torch.stack(values) for values in zip(*results, strict=True)])


class _Members(torch.autograd.Function):
    """The forward kernels of all members, and their backward kernels as its gradient."""

    @staticmethod
    @one_thread_after_fork()
    def forward(ctx: Any, ensemble: Ensemble, *tensors: Tensor) -> State:
        # As kernels read them: what had to be copied would lie anywhere.
        tensors = tuple([value.contiguous() for value in tensors])
        two = [ensemble.member(place, tensors) for place in (0, 1)]
        call = ensemble.scan.call(two[0])
        results = call.new_results(two[0], ensemble.size)
        saved, outputs, after = results
        first, second = (
            call.bind_forward(own, Results(saved[place], outputs[place], tuple([value[place] for value in after])))
            for place, own in enumerate(two)
        )
        call.run_each(call.training.forward, first, second, ensemble.size)
        ctx.ensemble, ctx.call = ensemble, call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)
        return outputs, *after

    @staticmethod
    @one_thread_after_fork()
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ensemble: Ensemble = ctx.ensemble
        saved, *tensors = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled():
            return None, *differentiated(ensemble.eager, tensors, ctx.needs_input_grad[1:], grads)
        call: Call = ctx.call
        of_members = _in_memory(call, saved, grads, ensemble.member(0, tensors))
        two = [ensemble.member(place, tensors) for place in (0, 1)]
        gradients = call.new_gradients(two[0], ensemble.size)
        first, second = (
            call.bind_backward(
                saved[place],
                own,
                [grad[place] for grad in of_members],
                Gradients(*[[value[place] for value in values] for values in gradients]),
            )
            for place, own in enumerate(two)
        )
        call.run_each(call.training.backward, first, second, ensemble.size)
        return None, *_in_order(ensemble, call, gradients, two[0])


def _in_memory(call: Call, saved: Tensor, grads: Sequence[Tensor | None], tensors: State) -> list[Tensor]:
    """Return the gradients of all members' results as kernels read them; zeros, the same for all, where there are none.

    Arguments:
        tensors: those of one member.
    """
    shapes = [(1, call.rows, *call.output), *[value.shape for value in call.split(tensors)[1]]]
    return [
        saved.new_zeros(shape).expand(len(saved), *shape) if grad is None else grad.contiguous().resolve_neg()
        for grad, shape in zip(grads, shapes, strict=True)
    ]


def _in_order(ensemble: Ensemble, call: Call, gradients: Gradients, tensors: State) -> list[Tensor | None]:
    """Return the members' gradients in the order of the ensemble's tensors: sums of those of what they share."""
    start, end = call.ends[0], call.ends[2]
    indices = call.training.gradients
    result: list[Tensor | None] = [None] * len(tensors)
    result[start:end] = gradients.states
    for index, grad in zip(indices.weights, gradients.weights, strict=True):
        result[end + index] = grad
    for index, grad in zip(indices.inputs, gradients.inputs, strict=True):
        value = tensors[index]
        grad = grad if value.shape[0] == call.steps else grad.sum(1, keepdim=True)
        result[index] = grad.reshape(ensemble.size, *value.shape)
    pairs = zip(result, ensemble.own, strict=True)
    return [grad if grad is None or own else grad.sum(0) for grad, own in pairs]
