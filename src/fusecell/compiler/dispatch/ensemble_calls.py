"""Prepared calls of ensembles: a kernel runs for each member, side by side, at the addresses of its tensors.

They are prepared for the first member. Those of the others lie at equal distances, the strides of the dimension that
members are along.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.dispatch.cached_calls import CachedCall, TrainingCall
from fusecell.compiler.dispatch.conversion import selector
from fusecell.compiler.dispatch.eligibility import needs_gradient
from fusecell.compiler.dispatch.prepare_call import guarded_tensors, is_preparable
from fusecell.compiler.dispatch.prepared_kernels import BoundBackward, BoundForward, ExampleCall, state_shapes
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.frontend.dtypes import has_16_bits
from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.programs.allocation import aligned, new_aligned
from fusecell.compiler.programs.autograd import TrainableStep
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.programs.launch import PreparedCall
from fusecell.compiler.programs.members import of_member
from fusecell.compiler.programs.prepacked import KernelCell
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.training import IndexedKernel, Training, write_saved
from fusecell.compiler.runtime.argument_block import NotPreparable
from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.options import State
from fusecell.shapes import has_flat_rows
from fusecell.torch_internals import tensor_guards

__all__ = ["prepare_members"]


def prepare_members(
    owner: nn.Module, form: CallForm, args: State, inputs: State, factory: CellFactory | None
) -> CachedCall | None:
    """Prepare the kernels of an ensemble's call; None where guards and addresses are not all that it takes.

    Arguments:
        owner: a cell, or a module that builds one, whose weights are those of all members.
        args: the inputs and, if the caller passed them, the states.
        inputs: those of the first member, as (T, N, ...).
        factory: how to build the cell of an owner that is none itself.
    """
    guarded = guarded_tensors(owner, factory)
    if guarded is None or has_16_bits(args[0].dtype):
        return None
    guards, module_tensors = guarded
    tensors = args + module_tensors
    own = form.own(len(args)) + [True] * len(module_tensors)
    check, first = tensor_guards(tensors), of_member(0, tensors, own)
    indices = {path: index for index, path in enumerate(guards.paths, len(args))}
    if factory is not None:
        indices = {path: indices[name] for path, name in factory.weights.items()}
    whole: Any = owner if factory is None else factory.cell()
    cell = rebound(whole, {path: first[index] for path, index in indices.items()}, ())
    of_one = form._replace(members=0, each=False)
    if check is None or not has_flat_rows(cell) or isinstance(cell, KernelCell):
        return None
    if not is_preparable(cell, of_one, len(args), inputs):
        return None
    step: Any = (TRAINABLE_STEPS if needs_gradient(cell, args) else PROGRAMS).find(cell, inputs)
    if not isinstance(step, TrainableStep | Program) or not step.traced.is_plain:
        return None
    leaves = step.traced.weights.stored_leaves
    if leaves is None:
        return None
    weights = [indices[path] for path, _ in leaves]
    matrices = tuple([leaf.of(first[index]).detach() for index, (_, leaf) in zip(weights, leaves, strict=True)])
    if any(matrix.data_ptr() != first[index].data_ptr() for matrix, index in zip(matrices, weights, strict=True)):
        return None
    call = ExampleCall(of_one, first, len(args), state_shapes(cell), weights, matrices)
    members = _Members(form.members, own, tensors)
    try:
        if isinstance(step, Program):
            return CachedCall(guards, check, _MembersInference(step, call, members))
        # Not the cell itself: a cached call keeps no weight alive, and gets those of its call when it is run again.
        template = rebound(cell, {path: args[0].new_empty(0) for path in indices}, ())
        return CachedCall(guards, check, _MembersTraining(step, template, [path for path, _ in leaves], call, members))
    except NotPreparable:
        return None


class _Members:
    """How many members there are, and how far apart their tensors are.

    Attributes:
        distances: in bytes, for each tensor of a call; 0 for what they have in common.
    """

    def __init__(self, size: int, own: Sequence[bool], tensors: State) -> None:
        self.size, self.own = size, list(own)
        self.distances = [
            value.stride(0) * value.element_size() if is_own else 0 for value, is_own in zip(tensors, own, strict=True)
        ]

    def selected(self, indices: Sequence[int]) -> _Members:
        """Return the same for some of the tensors."""
        result = _Members(self.size, (), ())
        result.own = [self.own[index] for index in indices]
        result.distances = [self.distances[index] for index in indices]
        return result

    def strides(
        self, prepared: PreparedCall, saved: Sequence[tuple[int, int]], saved_bytes: int
    ) -> npt.NDArray[np.int64]:
        """Return how much each argument differs in the next member, of those that a call reads and what is saved.

        Arguments:
            saved: the slot of each saved value, and its offset.
            saved_bytes: of a member's saved values.
        """
        result = np.zeros(prepared.slots, np.int64)
        for slot, index in prepared.reads:
            result[slot] = self.distances[index]
        for slot, _ in saved:
            result[slot] = saved_bytes
        return result

    def arguments(self, values: array[int], strides: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the arguments of each member, of those of the first and how much each differs in the next."""
        return np.frombuffer(values, np.int64) + np.arange(self.size)[:, None] * strides


class _MembersForward(BoundForward):
    """A forward kernel for the members of an ensemble, whose example is a call of the first."""

    def __init__(self, indexed: IndexedKernel, call: ExampleCall, members: _Members, saved_size: int = 0) -> None:
        super().__init__(indexed, call, saved_size and padded(saved_size))
        self._members = members
        itemsize = indexed.kernel.itemsize
        self._strides = members.strides(self.prepared, self._saved, self._saved_size * itemsize)
        for slot, shape in self._after:
            self._strides[slot] = math.prod(shape) * itemsize
        if self._shape is not None:
            self._strides[self._output] = math.prod(self._shape) * itemsize

    def __call__(self, tensors: State) -> tuple[Tensor | None, Tensor | None, State]:
        """Return what is saved for the backward, the outputs, and the last states, (members, ...) each."""
        size, like, saved, outputs = self._members.size, tensors[0], None, None
        values = self.prepared.bind(tensors)
        after: State = ()
        for slot, shape in self._after:
            state = like.new_empty(size, *shape)
            values[slot] = state.data_ptr()
            after += (state,)
        if self._shape is not None:
            outputs = like.new_empty(size, *self._shape)
            values[self._output] = outputs.data_ptr()
            outputs = outputs.transpose(1, 2) if self._rows_first else outputs
        if self._saved_size:
            saved = new_aligned(like, size, self._saved_size)
            write_saved(values, self._saved, saved)
        self.prepared.run_each(self._members.arguments(values, self._strides))
        return saved, outputs, after


class _MembersBackward(BoundBackward):
    """The backward kernel for the members of an ensemble, whose example is a call of the first."""

    def __init__(self, training: Training, call: ExampleCall, requires_grad: Sequence[bool], members: _Members) -> None:
        super().__init__(training, call, requires_grad)
        self._members = members
        (steps, rows), itemsize = call.sizes, training.backward.kernel.itemsize
        saved_bytes = padded(training.saved_size(steps * rows)) * itemsize
        self._strides = members.strides(self.prepared, self._saved, saved_bytes)
        for slot, _, shape in (*self._empty, *self._zeroed):
            self._strides[slot] = math.prod(shape) * itemsize

    def _gradients(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        size, prepared, strides = self._members.size, self.prepared, self._strides.copy()
        saved = aligned(saved)
        values = prepared.bind(tensors)
        in_memory = [
            None if grad is None else _laid_out(grad, layout) for grad, layout in zip(grads, self._layouts, strict=True)
        ]
        self._bind_grads(values, [None if grad is None else grad.select(0, 0) for grad in in_memory])
        for slots, grad in zip(self._slots, in_memory, strict=True):
            if slots and grad is not None:
                strides[slots[0]] = grad.stride(0) * grad.element_size()
        write_saved(values, self._saved, saved)
        result: list[Tensor | None] = [None] * self._count
        for slot, index, shape in self._empty:
            result[index] = grad = saved.new_empty(size, *shape)
            values[slot] = grad.data_ptr()
        for slot, index, shape in self._zeroed:
            result[index] = grad = saved.new_zeros(size, *shape)
            values[slot] = grad.data_ptr()
        prepared.run_each(self._members.arguments(values, strides))
        # Of what members have in common, the sum of their gradients.
        return [
            grad if grad is None or is_own else grad.sum(0)
            for grad, is_own in zip(result, self._members.own, strict=True)
        ]


def _laid_out(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a gradient (members, ...) each of whose members lies in memory with some strides."""
    grad = grad.resolve_neg()
    if grad.stride()[1:] == strides:
        return grad
    return torch.empty_strided(grad.shape, (math.prod(grad.shape[1:]), *strides), dtype=grad.dtype).copy_(grad)


class _MembersInference:
    """A cached call of an ensemble without gradients."""

    def __init__(self, program: Program, call: ExampleCall, members: _Members) -> None:
        slots = program.kernel.slots
        everything = IndexedKernel(program.kernel, list(slots.inputs), list(slots.weights))
        self._forward = _MembersForward(everything, call, members)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State]:
        return self._forward(tensors)[1:]


class _MembersTraining(TrainingCall):
    """A cached call of an ensemble with gradients."""

    def __init__(
        self, step: TrainableStep, template: Cell, paths: Sequence[str], call: ExampleCall, members: _Members
    ) -> None:
        assert call.weights is not None, "what is trained is no constant"
        indices = [*range(call.count), *call.weights]
        self._members = members.selected(indices)
        super().__init__(step, template, paths, call, selector(indices), None)

    def _bind(self, training: Training, call: ExampleCall, requires_grad: Sequence[bool], saved_size: int) -> None:
        self.forward = _MembersForward(training.forward, call, self._members, saved_size)
        self.backward = _MembersBackward(training, call, requires_grad, self._members)

    def again(self, owner: nn.Module, tensors: State, saved: Tensor, *, eager: bool) -> State:
        """Run the Python loop of each member under autograd, for gradients of gradients."""
        members = self._members
        results = [
            super(_MembersTraining, self).again(owner, of_member(place, tensors, members.own), saved[place], eager=True)
            for place in range(members.size)
        ]
        return tuple([torch.stack(values) for values in zip(*results, strict=True)])
