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
from fusecell.compiler.programs.members import backward_of_members, forward_of_members, in_memory, of_member
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

    def eager(self, tensors: Sequence[Any]) -> State:
        """Run the Python loop of each member."""
        results = [self.scan.eager(of_member(place, tensors, self.own)) for place in range(self.size)]
        return tuple([torch.stack(values) for values in zip(*results, strict=True)])


class _Members(torch.autograd.Function):
    """The forward kernels of all members, and their backward kernels as its gradient."""

    @staticmethod
    @one_thread_after_fork()
    def forward(ctx: Any, ensemble: Ensemble, *tensors: Tensor) -> State:
        read = in_memory(tensors)
        call = ensemble.scan.call(of_member(0, read, ensemble.own))
        saved, outputs, after = forward_of_members(call, ensemble.size, ensemble.own, read)
        ctx.ensemble, ctx.call = ensemble, call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)  # not the copies, through which no gradient of a gradient goes
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
        gradients = backward_of_members(ctx.call, ensemble.own, saved, in_memory(tensors), grads)
        # Of what members share, the sum of theirs.
        pairs = zip(gradients, ensemble.own, strict=True)
        return None, *[grad if grad is None or own else grad.sum(0) for grad, own in pairs]
