"""Prepared kernels: the argument block is filled once, and a call only writes the addresses of its tensors."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.programs.allocation import aligned, new_aligned, new_empty
from fusecell.compiler.programs.launch import PreparedCall
from fusecell.compiler.programs.training import IndexedKernel, Training, write_saved
from fusecell.compiler.runtime.argument_block import ArgumentBlock
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.execution.call_form import CallForm
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import State, steps_of
from fusecell.forks import in_forked_child
from fusecell.shapes import Shape, feature_shape

__all__ = ["BoundBackward", "BoundForward", "ExampleCall", "state_shapes"]


def state_shapes(cell: Cell) -> list[Shape]:
    """Return the shape of a row of each state."""
    return [feature_shape(size) for size in cell.state_sizes]


@dataclass(frozen=True)
class ExampleCall:
    """One call, whose tensors say the sizes and strides that a kernel is prepared for.

    Arguments:
        tensors: the inputs, the states unless they start at zero, and others.
        count: how many of them the caller gave: the inputs and the states.
        states: the shape of a row of each state.
        weights: the index of each weight among the tensors.
        matrices: the weights as kernels read them, views of the same memory; or those that all calls have in common,
            where ``weights`` is None.
    """

    form: CallForm
    tensors: State
    count: int
    states: Sequence[Shape]
    weights: Sequence[int] | None
    matrices: State

    @cached_property
    def inputs(self) -> State:
        """The inputs as (T, N, ...)."""
        return tuple(map(self.form.sequence, self.tensors[: self.form.inputs]))

    @property
    def states_passed(self) -> State:
        """The states as (N, ...), unless they start at zero."""
        return tuple(map(self.form.rows_of, self.tensors[self.form.inputs : self.count]))

    @property
    def sizes(self) -> tuple[int, int]:
        """Steps and rows."""
        return steps_of(self.inputs), self.inputs[0].shape[1]

    def reads(self, indexed: IndexedKernel) -> list[tuple[int, int]]:
        """Return slot and tensor of each input and of each weight, where a kernel reads them."""
        slots, count = indexed.kernel.slots, self.form.inputs
        inputs = zip(slots.inputs.values(), indexed.inputs, strict=True)
        reads = [(slot, index) for (slot, *_), index in inputs if index < count]
        if self.weights is None:
            return reads
        weights = zip(slots.weights.values(), indexed.weights, strict=True)
        return reads + [(slot, self.weights[index]) for (slot, *_), index in weights]


class BoundForward:
    """A forward kernel for calls with tensors like those of an example.

    Arguments:
        saved_size: how many numbers the kernel saves for a backward.
        prepare: makes the prepared call.

    Raises:
        NotPreparable: if one of the tensors would have to be copied first.
    """

    def __init__(
        self,
        indexed: IndexedKernel,
        call: ExampleCall,
        saved_size: int = 0,
        prepare: Callable[..., PreparedCall] = PreparedCall,
    ) -> None:
        kernel, form, like = indexed.kernel, call.form, call.tensors[0]
        slots, (steps, rows) = kernel.slots, call.sizes
        sizes, size = _state_sizes(kernel), kernel.output_sizes["output"]
        reads, first = call.reads(indexed), call.states_passed
        # States that start at zero are one row of zeros, with a stride of 0.
        self._zeros = like.new_zeros(max(sizes, default=0))
        if call.count == form.inputs:
            first = tuple([self._zeros[:size].expand(rows, size) for size in sizes])
        else:
            reads += [(slot, form.inputs + index) for index, (slot, _) in enumerate(slots.first)]
        after = [like.new_empty(form.state_shape(rows, *shape)) for shape in call.states]
        block = kernel.block()
        indexed.bind(block, call.inputs, call.matrices)
        block.bind(first=first, last=map(form.rows_of, after), outputs=[like.new_empty(steps, rows, size)])
        self._after = [(slot, tuple(value.shape)) for (slot, _), value in zip(slots.last, after, strict=True)]
        ((self._output, *_),) = slots.outputs.values()
        self._shape = form.output_shape(steps, rows, size) if form.outputs else None
        self._rows_first = form.rows_first
        self._saved, self._saved_size = indexed.saved_offsets(steps * rows), saved_size
        unread = [] if form.outputs else [(self._output, steps * rows * size * kernel.itemsize)]
        self.prepared = prepare(kernel, block, steps, rows, form.reverse, reads, unread)

    def __call__(self, tensors: State) -> tuple[Tensor | None, Tensor | None, State]:
        """Return what is saved for the backward, the outputs if they are wanted, and the states after the last step."""
        prepared, like, saved, outputs = self.prepared, tensors[0], None, None
        values = prepared.bind(tensors)
        after: State = ()
        for slot, shape in self._after:
            state = like.new_empty(shape)
            values[slot] = state.data_ptr()
            after += (state,)
        if self._shape is not None:
            outputs = new_empty(like, *self._shape, rows_first=self._rows_first)
            values[self._output] = outputs.data_ptr()
        if self._saved_size:
            saved = new_aligned(like, self._saved_size)
            write_saved(values, self._saved, saved)
        prepared.run(values)
        return saved, outputs, after


class BoundBackward:
    """The backward kernel for calls with tensors like those of an example.

    Arguments:
        call: its tensors are the inputs, the states unless they start at zero, and all weights.
        requires_grad: whether each of them needs a gradient.

    Raises:
        NotPreparable: if one of the tensors would have to be copied first.
    """

    def __init__(self, training: Training, call: ExampleCall, requires_grad: Sequence[bool]) -> None:
        indexed, form, like = training.backward, call.form, call.tensors[0]
        self._form, self._count = form, len(call.tensors)
        kernel, (steps, rows), sizes = indexed.kernel, call.sizes, _state_sizes(training.forward.kernel)
        slots, indices = kernel.slots, training.gradients
        grads = [like.new_empty(tensor.shape) for tensor in call.tensors]
        output = like.new_empty(steps, rows, training.output_size)
        states = [like.new_empty(rows, *shape) for shape in call.states]
        block = kernel.block()
        indexed.bind(block, (*call.inputs, output), call.matrices)
        assert call.weights is not None, "what is trained is no constant"
        weights = [call.weights[index] for index in indices.weights]
        block.bind(
            first=states,
            last=states,
            outputs=[form.sequence(grads[index]) for index in indices.inputs],
            sums=[
                grads[place].reshape(call.matrices[index].shape)
                for place, index in zip(weights, indices.weights, strict=True)
            ],
        )
        # A result that the loss does not depend on has no gradient: it is read as zeros, with strides of 0.
        self._zeros = like.new_zeros(max(training.output_size, *sizes, 0))
        of_output = dict(zip(indexed.inputs, slots.inputs.values(), strict=True)).get(form.inputs, ())
        self._slots = (of_output, *slots.first)
        self._layouts = [form.output(output).stride(), *[form.state(value).stride() for value in states]]
        self._saved = indexed.saved_offsets(steps * rows)
        # The slot, tensor and shape of each gradient to allocate: the kernel overwrites some and adds to others.
        shapes = [tuple(tensor.shape) for tensor in call.tensors]
        self._empty: list[tuple[int, int, tuple[int, ...]]] = []
        self._zeroed: list[tuple[int, int, tuple[int, ...]]] = []
        unread = []
        for index, ((slot, _), size) in enumerate(zip(slots.last, sizes, strict=True), form.inputs):
            if index < call.count and requires_grad[index]:
                self._empty.append((slot, index, shapes[index]))
            else:
                unread.append((slot, rows * size * kernel.itemsize))
        for (slot, *_), index in zip(slots.outputs.values(), indices.inputs, strict=True):
            self._empty.append((slot, index, shapes[index]))
        for (slot, *_), index, overwritten in zip(slots.sums.values(), weights, indices.overwritten, strict=True):
            (self._empty if overwritten else self._zeroed).append((slot, index, shapes[index]))
        self.prepared = PreparedCall(kernel, block, steps, rows, not form.reverse, call.reads(indexed), unread)

    def __call__(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients in the order of ``tensors``.

        Arguments:
            grads: the gradients of the outputs and of each state after the last step.
        """
        if in_forked_child():
            with one_thread_after_fork():
                return self._gradients(saved, tensors, grads)
        return self._gradients(saved, tensors, grads)

    def _gradients(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        prepared, saved = self.prepared, aligned(saved)
        values = prepared.bind(tensors)
        copies = self._bind_grads(values, grads)
        write_saved(values, self._saved, saved)
        result: list[Tensor | None] = [None] * self._count
        for slot, index, shape in self._empty:
            result[index] = grad = saved.new_empty(shape)
            values[slot] = grad.data_ptr()
        for slot, index, shape in self._zeroed:
            result[index] = grad = saved.new_zeros(shape)
            values[slot] = grad.data_ptr()
        prepared.run(values)
        del copies
        return result

    def _bind_grads(self, values: array[int], grads: Sequence[Tensor | None]) -> list[object]:
        """Bind the gradients of results; return what must live until the kernel returns."""
        zeros = self._zeros.data_ptr()
        copies: list[object] = []
        for slots, grad, strides in zip(self._slots, grads, self._layouts, strict=True):
            if not slots:  # the kernel does not read it
                continue
            if grad is None:
                values[slots[0]] = zeros
                for slot in slots[1:]:
                    values[slot] = 0
            elif grad.stride() == strides and not grad.is_neg():
                values[slots[0]] = grad.data_ptr()
            else:
                grad, block = grad.resolve_neg(), ArgumentBlock(self.prepared.kernel.slots, values)
                copies += [grad, block]
                if slots is self._slots[0]:
                    block.bind_sequences((slots,), (self._form.scanned(grad),))
                else:
                    block.bind_states((slots,), (self._form.rows_of(grad),))
        return copies


def _state_sizes(kernel: Kernel) -> list[int]:
    """Return the features of each state."""
    graph = kernel.plan.graph
    return [graph[leaf].size for leaf, _ in kernel.plan.states.values()]
