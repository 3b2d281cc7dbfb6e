"""Cached calls: each runs the kernels of an earlier call, with the addresses of another call's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.dispatch.conversion import Conversion
from fusecell.compiler.dispatch.prepared_kernels import BoundBackward, BoundForward, ExampleCall, state_shapes
from fusecell.compiler.frontend.dtypes import widened
from fusecell.compiler.frontend.guards import ModuleGuards
from fusecell.compiler.programs.autograd import TrainableStep, differentiated, transformed
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.programs.prepacked import KernelCell, PrepackedCall
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.training import IndexedKernel, Training
from fusecell.compiler.runtime.argument_block import NotPreparable
from fusecell.eager import run_eager
from fusecell.execution.call_form import CallForm
from fusecell.execution.context import recomputing
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.torch_internals import apply_directly, has_saved_tensor_hooks

__all__ = ["CachedCall", "InferenceCall", "OwnKernelCall", "TrainingCall", "without_weights"]


class CachedCall(NamedTuple):
    """Guards of one call, on its module and on its tensors, and what runs another one for which they hold."""

    guards: ModuleGuards
    check_tensors: Callable[..., bool]
    run: Callable[[nn.Module, State], tuple[Tensor | None, State] | None]


class InferenceCall:
    """A cached call without gradients."""

    def __init__(self, program: Program, call: ExampleCall) -> None:
        slots = program.kernel.slots
        everything = IndexedKernel(program.kernel, list(slots.inputs), list(slots.weights))
        self._forward = BoundForward(everything, call)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        return self._forward(tensors)[1:]


class OwnKernelCall:
    """A cached call of a cell that comes with its kernel, whose weights are packed."""

    def __init__(self, cell: KernelCell, form: CallForm, args: State) -> None:
        self._prepacked = own = cell.prepacked()
        slots = own.kernel.slots
        everything = IndexedKernel(own.kernel, list(slots.inputs), list(slots.weights))
        call = ExampleCall(form, args, len(args), state_shapes(cell), None, own.packed_weights)
        self._forward = BoundForward(everything, call, prepare=partial(PrepackedCall, own))

    def __call__(self, owner: Any, tensors: State) -> tuple[Tensor | None, State] | None:
        cell = owner if isinstance(owner, KernelCell) else owner.leaf_cells()[0][2]
        if cell.prepacked() is not self._prepacked:  # its weights have changed
            return None
        return self._forward(tensors)[1:]


class TrainingCall:
    """A cached call with gradients.

    Arguments:
        template: a copy of the cell without its weights, where the cell is built anew for each call.
        paths: of the cell's tensors that the last ones of ``select`` take the place of when the step is run again.
        select: returns what goes through autograd of a call's tensors: the caller's, then the weights, then the tensors
            that weights are computed from.
        conversion: what the tensors went through, in a 16-bit layer.
    """

    def __init__(
        self,
        step: TrainableStep,
        template: Cell | None,
        paths: Sequence[str],
        call: ExampleCall,
        select: Callable[[State], State],
        conversion: Conversion | None,
    ) -> None:
        self._template, self._step, self._paths, self._conversion = template, step, paths, conversion
        self.form, self._count, self._select = call.form, call.count, select
        everything = select(call.tensors)
        tensors = everything[: call.count + len(call.matrices)]
        self._computes = len(everything) > len(tensors)
        call = replace(call, tensors=tensors, weights=range(call.count, len(tensors)))
        requires_grad = [value.requires_grad for value in tensors]
        flags = (*requires_grad[: call.form.inputs], *requires_grad[call.count :])
        training = step.training(flags, bool(call.form.recompute or recomputing()))
        if not isinstance(training, Training):
            raise NotPreparable
        self._training = training
        steps, rows = call.sizes
        self._bind(training, call, requires_grad, training.saved_size(steps * rows))

    def _bind(self, training: Training, call: ExampleCall, requires_grad: Sequence[bool], saved_size: int) -> None:
        """Bind the kernels to calls like an example; ``saved_size`` is how many numbers the forward saves."""
        self.forward = BoundForward(training.forward, call, saved_size)
        self.backward = BoundBackward(training, call, requires_grad)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        # torch.utils.checkpoint counts saved tensors to find them again in its second forward: both take the slow path.
        if has_saved_tensor_hooks():
            return None
        results = _apply(self, owner, *self._select(tensors))
        if self.form.outputs:
            return results[0], results[1:]
        return None, results

    def again(self, owner: nn.Module, tensors: State, saved: Tensor, *, eager: bool) -> State:
        """Run the call again under autograd, for gradients of gradients.

        Arguments:
            saved: by its forward.
            eager: by the Python loop, for gradients of many backwards at once.
        """
        if self._conversion is not None:  # the loop's results have the layer's dtype, their gradients the kernel's
            tensors = self._conversion.restored(tensors)
        # What weights are computed from is last: a gradient of it is one of the step, through the computation.
        args, sources, form = tensors[: self._count], tensors[len(tensors) - len(self._paths) :], self.form
        cell: Any = self._template
        if cell is None:
            cell = owner
            self._step.check_unchanged(cell)
        inputs = tuple(map(form.sequence, args[: form.inputs]))
        x, state = inputs[0], tuple(map(form.rows_of, args[form.inputs :]))
        if not state:
            state = cell.initial_state(x.shape[1], dtype=x.dtype, device=x.device)
        cell = rebound(cell, dict(zip(self._paths, sources, strict=True)), ())
        options = Options(reverse=form.reverse)
        before = None if self._conversion is not None else (self._training, saved)
        result = None if eager or self._computes else self._step(cell, inputs, state, options, before)
        outputs, after = run_eager(cell, inputs, state, options) if not isinstance(result, tuple) else result
        states = tuple([form.state(value) for value in after])
        results = (form.output(outputs), *states) if form.outputs else states
        return results if self._conversion is None else widened(results)


def without_weights(cell: Cell) -> Cell:
    """Empty a cell whose tensors are plain attributes, so that it keeps no weight alive."""
    for name, value in vars(cell).items():
        if isinstance(value, Tensor):
            vars(cell)[name] = None
    return cell


class _CachedScan(torch.autograd.Function):
    """A cached call's forward kernel, and its backward kernel as the gradient."""

    @staticmethod
    @natively
    def forward(ctx: Any, call: TrainingCall, owner: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        saved, outputs, after = call.forward(tensors)
        ctx.call, ctx.owner = call, owner
        ctx.set_materialize_grads(False)  # None for a gradient that there is none of: kernels need no zeros for it
        ctx.save_for_backward(saved, *tensors)  # which sees if a tensor is changed in place before the backward
        return after if outputs is None else (outputs, *after)

    @staticmethod
    @natively
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: TrainingCall = ctx.call
        all_saved: State = ctx.saved_tensors
        saved, tensors = all_saved[0], all_saved[1:]
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * (2 + len(tensors))
        if torch.is_grad_enabled() or transformed(grads):
            owner: nn.Module = ctx.owner
            needed = ctx.needs_input_grad[2:]
            eager = transformed(grads)
            return (
                None,
                None,
                *differentiated(lambda aliases: call.again(owner, aliases, saved, eager=eager), tensors, needed, grads),
            )
        if not call.form.outputs:  # then the states are the only results
            grads = (None, *grads)
        gradients = call.backward(saved, tensors, grads)
        return None, None, *gradients, *(None,) * (len(tensors) - len(gradients))


# Past torch's own `apply`, which looks for transforms of torch.func: the tensors' guards have done so.
_apply: Any = apply_directly(_CachedScan)
