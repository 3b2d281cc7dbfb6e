"""The forward and the backward kernel of a step as a pair: what one saves for the other, and running them.

`autograd` makes the pair of a cell, and joins it to torch's autograd.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.programs.allocation import aligned, new_aligned, new_empty
from fusecell.compiler.programs.launch import RaggedRows, run, run_each
from fusecell.compiler.runtime.argument_block import ArgumentBlock
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.compiler.transforms.partition import ForwardBackward
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State, steps_of
from fusecell.shapes import Shape

__all__ = ["Call", "IndexedKernel", "Training", "write_saved"]


class IndexedKernel:
    """A kernel that reads some of a call's tensors, found by their index; what it doesn't read is left out.

    Arguments:
        inputs, weights: the names of a call's tensors.
        saved: name and features of each value that goes from forward to backward, in the order of their memory.

    Attributes:
        inputs, weights: indices of the tensors that the kernel reads, in its order.
    """

    def __init__(
        self, kernel: Kernel, inputs: Sequence[str], weights: Sequence[str], saved: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.kernel, slots = kernel, kernel.slots
        self.inputs = [inputs.index(name) for name in slots.inputs]
        self.weights = [weights.index(name) for name in slots.weights]
        self._saved = [(slots.saved.get(name), padded(size)) for name, size in saved]

    def bind(self, block: ArgumentBlock, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Bind the inputs and weights that the kernel reads, out of all those of a call."""
        block.bind(inputs=[inputs[index] for index in self.inputs], weights=[weights[index] for index in self.weights])

    def saved_offsets(self, all_rows: int) -> list[tuple[int, int]]:
        """Return slot and byte offset of each saved value that the kernel uses.

        Each value has a region of its own with a row for every row of every step, so one address says where all of
        it is, whichever other values a kernel uses.
        """
        offsets, offset = [], 0
        for slot, size in self._saved:
            if slot is not None:
                offsets.append((slot, offset))
            offset += size * all_rows * self.kernel.itemsize
        return offsets


def write_saved(values: array[int], offsets: Sequence[tuple[int, int]], saved: Tensor) -> None:
    """Write the address of each saved value into the slots of an argument block.

    Arguments:
        saved: the memory of all of them, aligned, :meth:`Training.saved_size` numbers.
    """
    start = saved.data_ptr()
    for slot, offset in offsets:
        values[slot] = start + offset


class Training:
    """The forward and the backward kernel of a step, for one choice of gradients.

    Arguments:
        inputs, weights: the names of a call's tensors, in order.
        graphs: the forward and the backward graph.
        about: what they are the kernels of, for ``FUSECELL_DEBUG``.
    """

    def __init__(
        self, inputs: Sequence[str], weights: Sequence[str], graphs: ForwardBackward, about: str = "step"
    ) -> None:
        self.graphs = graphs
        # To the backward the gradient of the output is another input, with a row for every row of every step.
        self._inputs, self._weights = (*inputs, "grad.output"), tuple(weights)
        self.forward = self._indexed(compile_graph(graphs.forward, about=f"{about}, forward"))
        self.backward = self._indexed(compile_graph(graphs.backward, backward=True, about=f"{about}, backward"))
        self.output_size = self.forward.kernel.output_sizes["output"]
        self.saved_numbers = sum(padded(size) for _, size in graphs.saved)

    def _indexed(self, kernel: Kernel) -> IndexedKernel:
        return IndexedKernel(kernel, self._inputs, self._weights, self.graphs.saved)

    def saved_size(self, all_rows: int) -> int:
        """Return how many numbers are saved for all rows of all steps together, and a few more: never none."""
        # Programs that torch.compile keeps on disk from process to process have this size in them.
        return all_rows * self.saved_numbers + 4 * LANES

    @cached_property
    def gradients(self) -> _GradientIndices:
        """Which gradients the backward kernel computes."""
        slots, whole = self.backward.kernel.slots, self.backward.kernel.plan.covered()
        return _GradientIndices(
            [self._inputs.index(label.removeprefix("grad.input.")) for label in slots.outputs],
            [self._weights.index(label.removeprefix("grad.weight.")) for label in slots.sums],
            [label in whole for label in slots.sums],
        )


@dataclass(frozen=True)
class _GradientIndices:
    """The gradients that a backward kernel computes, in its order.

    Arguments:
        inputs, weights: indices among a call's inputs and weights.
        overwritten: whether the kernel writes every number of a weight's gradient; it adds to others, which start as
            zeros.
    """

    inputs: list[int]
    weights: list[int]
    overwritten: list[bool]


class Results(NamedTuple):
    """What a forward writes: what it saves, its outputs, and the states after its last step."""

    saved: Tensor
    outputs: Tensor
    after: State


class Gradients(NamedTuple):
    """What a backward writes: the gradients of some inputs, of all states and states to reset to, of some weights."""

    inputs: list[Tensor]
    states: list[Tensor]
    resets: list[Tensor]
    weights: list[Tensor]


@dataclass(slots=True)
class Call:
    """One call of a layer: what its forward and its backward have in common.

    Arguments:
        all_rows: rows of all steps together.
        output: the shape of a row of the output.
        generator_state: of torch's generator before the call drew what its steps draw.
        saved: what the same call has saved before, whose forward isn't run again.
        ends: where inputs, states, states to reset to, and weights end among the call's tensors. The tensors that
            weights are computed from come last.
    """

    training: Training
    options: Options
    steps: int
    rows: int
    ragged: RaggedRows | None
    all_rows: int
    ends: tuple[int, int, int, int]
    output: Shape = ()
    generator_state: Tensor | None = None
    saved: Tensor | None = None

    @classmethod
    def of(
        cls,
        training: Training,
        inputs: State,
        state: State,
        reset: State,
        weights: State,
        options: Options,
        output: Shape | None = None,
    ) -> Call:
        """Describe a call with these tensors.

        Arguments:
            reset: the states that resets go back to, if there are any.
            output: the shape of a row of the output; flat if left out.
        """
        steps, rows = steps_of(inputs), inputs[0].shape[1]
        ragged = None if options.lengths is None else RaggedRows.of(options.lengths, steps)
        all_rows = steps * rows if ragged is None else ragged.all_rows
        a = len(inputs)
        b = a + len(state)
        c = b + len(reset)
        output = (training.output_size,) if output is None else output
        return cls(training, options, steps, rows, ragged, all_rows, (a, b, c, c + len(weights)), output)

    def split(self, tensors: State) -> tuple[State, State, State, State, State]:
        """Split a call's tensors into inputs, states, states to reset to, weights, and what weights come from."""
        a, b, c, d = self.ends
        return tensors[:a], tensors[a:b], tensors[b:c], tensors[c:d], tensors[d:]

    @property
    def gradient_places(self) -> list[int]:
        """The places among the call's tensors of those that :meth:`gradients` returns a gradient for."""
        indices, (a, _, c, _) = self.training.gradients, self.ends
        return sorted([*indices.inputs, *range(a, c), *(c + index for index in indices.weights)])

    @one_thread_after_fork()
    def forward(self, tensors: State) -> Results:
        """Run the forward kernel; of a call that has been run before, return what it saved, and results unwritten."""
        if self.saved is not None:
            like, state = tensors[0], self.split(tensors)[1]
            unwritten = like.new_empty(1).expand(self.steps, self.rows, *self.output)
            return Results(self.saved, unwritten, tuple([value.new_empty(1).expand(value.shape) for value in state]))
        results = self.new_results(tensors)
        self.run_forward(tensors, results)
        return results

    def run_forward(self, tensors: State, results: Results) -> None:
        """Run the forward kernel, which writes to the memory of some results."""
        self._run(self.training.forward, self.bind_forward(tensors, results), reverse=self.options.reverse)

    def new_results(self, tensors: State, *members: int) -> Results:
        """Allocate what the forward writes; of several members of an ensemble, with a dimension for them."""
        like, state = tensors[0], self.split(tensors)[1]
        # A multiple of a cache line, so that all members' are aligned alike.
        saved = new_aligned(like, *members, padded(self.training.saved_size(self.all_rows)))
        after = tuple([value.new_empty(*members, *value.shape) for value in state])
        return Results(saved, self._new_rows(like, *self.output, members=members), after)

    def bind_forward(self, tensors: State, results: Results) -> ArgumentBlock:
        """Return the forward kernel's block, with all bound but the sizes."""
        inputs, state, reset, weights, _ = self.split(tensors)
        training = self.training
        block = training.forward.kernel.block()
        training.forward.bind(block, inputs, weights)
        block.bind(first=state, last=results.after, outputs=(results.outputs,), reset=reset or None)
        self._bind_common(training.forward, block, results.saved)
        return block

    @one_thread_after_fork()
    def gradients(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run the backward kernel; return the gradients in the order of ``tensors``.

        Arguments:
            grads: the gradients of the outputs and of each state after the last step.
        """
        gradients, saved = self.new_gradients(tensors), aligned(saved)
        block = self.bind_backward(saved, tensors, grads, gradients)
        self._run(self.training.backward, block, reverse=not self.options.reverse)
        return self.in_order(gradients, tensors)

    def new_gradients(self, tensors: State, *members: int) -> Gradients:
        """Allocate what the backward writes; of several members of an ensemble, with a dimension for them."""
        inputs, state, reset, weights, _ = self.split(tensors)
        like, indices = inputs[0], self.training.gradients
        return Gradients(
            [self._new_rows(like, inputs[index][0, 0].numel(), members=members) for index in indices.inputs],
            [value.new_empty(*members, *value.shape) for value in state],
            [value.new_zeros(*members, *value.shape) for value in reset],
            [
                (like.new_empty if overwritten else like.new_zeros)(*members, *weights[index].shape)
                for index, overwritten in zip(indices.weights, indices.overwritten, strict=True)
            ],
        )

    def bind_backward(
        self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None], gradients: Gradients
    ) -> ArgumentBlock:
        """Return the backward kernel's block, with all bound but the sizes."""
        inputs, state, _, weights, _ = self.split(tensors)
        training = self.training
        # A gradient may be lazily negated, which its memory does not show.
        grads = [grad if grad is None or not grad.is_neg() else grad.resolve_neg() for grad in grads]
        grad_output = saved.new_zeros(1, self.rows, *self.output) if grads[0] is None else grads[0]
        grad_after = [
            saved.new_zeros(value.shape) if grad is None else grad for grad, value in zip(grads[1:], state, strict=True)
        ]
        block = training.backward.kernel.block()
        training.backward.bind(block, (*inputs, grad_output), weights)
        # Backward in time: the first state that the kernel reads is the gradient of the last, and so on.
        block.bind(
            first=grad_after,
            last=gradients.states,
            reset=gradients.resets or None,
            outputs=gradients.inputs,
            sums=gradients.weights,
        )
        self._bind_common(training.backward, block, saved)
        block.copies += [grad_output, *grad_after]  # to live as long as the block
        return block

    def in_order(self, gradients: Gradients, tensors: State) -> list[Tensor | None]:
        """Return gradients in the order of ``tensors``."""
        indices, inputs = self.training.gradients, self.split(tensors)[0]
        result: list[Tensor | None] = [None] * len(tensors)
        start, middle, end, _ = self.ends
        result[start:middle], result[middle:end] = gradients.states, gradients.resets
        for index, grad in zip(indices.weights, gradients.weights, strict=True):
            result[end + index] = grad
        for index, grad in zip(indices.inputs, gradients.inputs, strict=True):
            result[index] = _like_input(grad, inputs[index])
        return result

    def _bind_common(self, indexed: IndexedKernel, block: ArgumentBlock, saved: Tensor) -> None:
        """Bind what forward and backward have in common."""
        block.bind(resets=self.options.resets)
        write_saved(block.values, indexed.saved_offsets(self.all_rows), saved)

    def _run(self, indexed: IndexedKernel, block: ArgumentBlock, *, reverse: bool) -> None:
        run(indexed.kernel, block, self.steps, self.rows, reverse, self.ragged)

    def run_each(self, indexed: IndexedKernel, first: ArgumentBlock, second: ArgumentBlock, count: int) -> None:
        """Run a kernel for the members of an ensemble, given the blocks of two of them."""
        reverse = self.options.reverse != (indexed is self.training.backward)
        run_each(indexed.kernel, (first, second), count, self.steps, self.rows, reverse, self.ragged)

    def _new_rows(self, like: Tensor, *shape: int, members: Sequence[int] = ()) -> Tensor:
        """Allocate a (T, N, ...) result; zeros where rows end before the others, as kernels don't write there."""
        if self.options.lengths is None and not members:
            return new_empty(like, self.steps, self.rows, *shape)
        if self.options.lengths is None:
            return new_empty(like, *members, self.steps, self.rows, *shape)
        return like.new_zeros(*members, self.steps, self.rows, *shape)


def _like_input(grad: Tensor, value: Tensor) -> Tensor:
    """Return a gradient in the shape of its input: summed over steps for an input that is the same at all of them."""
    if value.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(value.shape)
