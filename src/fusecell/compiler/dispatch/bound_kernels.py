"""Kernels made ready for calls that are alike but for their tensors' values: all that a call writes is addresses."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fusecell.compiler.ir.sizes import align_up
from fusecell.compiler.programs.allocation import new_empty
from fusecell.compiler.programs.launch import PreparedCall
from fusecell.compiler.programs.training import Training
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.execution.call_form import CallForm
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import State
from fusecell.forks import in_forked_child

__all__ = ["Backward", "Forward", "NotPreparable"]


class NotPreparable(Exception):
    """These tensors need more than addresses."""


class Forward:
    """A forward kernel for calls with tensors like these.

    Arguments:
        inputs, weights: for each of the kernel's, its place among a call's tensors.
        matrices: of the kernel's weights, as it takes them.
        tensors: of one such call; what is given comes first.
        count: how many are given: the input, and the states unless they start at zero.
        saved: for each value that is kept for the backward, its word and its place in memory; with all its numbers.

    Raises:
        NotPreparable: one of the tensors has to be copied first, or is no tensor of the usual kind.
    """

    def __init__(
        self,
        kernel: Kernel,
        call_form: CallForm,
        inputs: Sequence[int],
        weights: Sequence[int],
        matrices: State,
        tensors: State,
        count: int,
        saved: tuple[Sequence[tuple[int, int]], int] = ((), 0),
    ) -> None:
        words, block = kernel.words, kernel.block()
        x = call_form.sequence(tensors[0])
        steps, rows, like = x.shape[0], x.shape[1], tensors[0]
        self._outputs: tuple[int, ...] | None = None
        self.saved_offsets, self.saved_size = saved
        given = [tensors[index] for index in inputs]
        kept = kernel.give_sequences(block, words.inputs.values(), map(call_form.sequence, given))
        kept += kernel.give_matrices(block, words.weights.values(), matrices)
        self._reads = [(words[0], index) for words, index in zip(words.inputs.values(), inputs, strict=True)]
        self._reads += [(words[0], index) for words, index in zip(words.weights.values(), weights, strict=True)]
        sizes = state_sizes(kernel)
        self._zeros = like.new_zeros(max(sizes, default=0))
        if count > 1:
            kept += kernel.give_states(block, words.first, map(call_form.rows_of, tensors[1:count]))
            self._reads += [(places[0], 1 + index) for index, places in enumerate(words.first)]
        else:
            for ptr, _ in words.first:
                block[ptr] = self._zeros.data_ptr()
        if kept:
            raise NotPreparable
        after = [like.new_empty(call_form.state_shape(rows, size)) for size in sizes]
        kernel.give_states(block, words.last, map(call_form.rows_of, after))
        self._after = [(places[0], value.shape) for places, value in zip(words.last, after, strict=True)]
        ((place, step, row),) = words.outputs.values()
        size = kernel.output_sizes["output"]
        block[step], block[row] = rows * size * kernel.itemsize, size * kernel.itemsize
        self._output, unread = place, [(place, steps * rows * size * kernel.itemsize)]
        self._rows_first = call_form.rows_first
        if call_form.outputs:
            self._outputs, unread = call_form.output_shape(steps, rows, size), []
        self.ready = PreparedCall(kernel, block, steps, rows, call_form.reverse, unread)

    def __call__(self, tensors: State) -> tuple[Tensor | None, Tensor | None, State]:
        """What is saved for the backward, the outputs if they are wanted, and the states after the last step."""
        ready, like, saved, outputs = self.ready, tensors[0], None, None
        block = ready.block()
        for place, index in self._reads:
            block[place] = tensors[index].data_ptr()
        after: State = ()
        for place, shape in self._after:
            made = like.new_empty(*shape)
            block[place] = made.data_ptr()
            after += (made,)
        if self._outputs is not None:
            outputs = new_empty(like, *self._outputs, rows_first=self._rows_first)
            block[self._output] = outputs.data_ptr()
        if self.saved_size:
            saved = new_empty(like, self.saved_size)
            give_saved(block, self.saved_offsets, saved)
        ready.run(block)
        return saved, outputs, after


class Backward:
    """The backward kernel of calls with tensors like these: arguments as of :class:`Forward`.

    Arguments:
        matrices: of all weights.
        due: which of the tensors' gradients are wanted.
    """

    def __init__(
        self,
        training: Training,
        call_form: CallForm,
        matrices: State,
        tensors: State,
        count: int,
        due: Sequence[bool],
    ) -> None:
        half = training.backward
        kernel, self._call_form = half.kernel, call_form
        words, block, item = kernel.words, kernel.block(), kernel.itemsize
        x = call_form.sequence(tensors[0])
        steps, rows, like = x.shape[0], x.shape[1], tensors[0]
        self._size, sizes = training.forward.kernel.output_sizes["output"], state_sizes(training.forward.kernel)
        # A gradient that doesn't come in: zeros, the same for all steps and rows.
        self._zeros = like.new_zeros(max(self._size, *sizes, 0))
        output = like.new_empty(steps, rows, self._size)
        states = [like.new_empty(rows, size) for size in sizes]
        if half.give(block, (x, output), matrices) or kernel.give_states(block, words.first, states):
            raise NotPreparable
        self._reads: list[tuple[int, int]] = []
        self._output: tuple[int, ...] = ()
        for places, index in zip(words.inputs.values(), half.input_indices, strict=True):
            if index:
                self._output = places
            else:
                self._reads.append((places[0], 0))
        for places, index in zip(words.weights.values(), half.weight_indices, strict=True):
            self._reads.append((places[0], count + index))
        self._strides = [call_form.output(output).stride(), *[call_form.state(value).stride() for value in states]]
        self._saved, _ = saved_offsets(half.saved, steps * rows * item)
        unread: list[tuple[int, int]] = []
        self._makes: list[tuple[int, int, tuple[int, ...]]] = []
        for index, (places, size) in enumerate(zip(words.last, sizes, strict=True), 1):
            if count > 1 and due[index]:
                self._makes.append((places[0], index, tuple(tensors[index].shape)))
            else:
                unread.append((places[0], rows * size * item))
        kernel.give_states(block, words.last, states)
        self._fill(training, block, matrices, tensors, count)
        self._count = len(tensors)
        self.ready = PreparedCall(kernel, block, steps, rows, not call_form.reverse, unread)

    def _fill(self, training: Training, block: array[int], matrices: State, tensors: State, count: int) -> None:
        """The strides of the gradients of inputs and weights."""
        kernel, results, words = training.backward.kernel, training.results, training.backward.kernel.words
        self._adds: list[tuple[int, int, tuple[int, ...]]] = []
        for places, index in zip(words.outputs.values(), results.inputs, strict=True):
            made = tensors[index].new_empty(tensors[index].shape)
            kernel.give_sequences(block, (places,), (self._call_form.sequence(made),))
            self._makes.append((places[0], index, tuple(made.shape)))
        for places, index, fills in zip(words.sums.values(), results.weights, results.fills, strict=True):
            made = tensors[count + index].new_empty(tensors[count + index].shape)
            kernel.give_matrices(block, (places,), (made.reshape(matrices[index].shape),))
            (self._makes if fills else self._adds).append((places[0], count + index, tuple(made.shape)))

    def __call__(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients, in the order of the tensors."""
        if in_forked_child():
            with one_thread_after_fork():
                return self._gradients(saved, tensors, grads)
        return self._gradients(saved, tensors, grads)

    def _gradients(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the tensors, from those of the outputs (None where nobody wanted them) and of the states."""
        ready = self.ready
        block = ready.block()
        for place, index in self._reads:
            block[place] = tensors[index].data_ptr()
        kept = self._give_grads(block, grads)
        give_saved(block, self._saved, saved)
        found: list[Tensor | None] = [None] * self._count
        for place, index, shape in self._makes:
            found[index] = made = saved.new_empty(*shape)
            block[place] = made.data_ptr()
        for place, index, shape in self._adds:
            found[index] = made = saved.new_zeros(shape)
            block[place] = made.data_ptr()
        ready.run(block)
        del kept
        return found

    def _give_grads(self, block: array[int], grads: Sequence[Tensor | None]) -> list[Any]:
        """Give the gradients that come in; returns what must live until the kernel returns."""
        kernel, kept = self.ready.kernel, []
        zeros = self._zeros.data_ptr()
        for places, grad, strides in zip((self._output, *kernel.words.first), grads, self._strides, strict=True):
            if not places:
                continue
            if grad is None:
                block[places[0]] = zeros
                for place in places[1:]:
                    block[place] = 0
            elif grad.stride() == strides and not grad.is_neg():
                block[places[0]] = grad.data_ptr()
            elif places is self._output:
                kept += kernel.give_sequences(block, (places,), (self._call_form.scanned(grad.resolve_neg()),))
            else:
                kept += kernel.give_states(block, (places,), (self._call_form.rows_of(grad.resolve_neg()),))
        return kept


def state_sizes(kernel: Kernel) -> list[int]:
    """The features of each state of a kernel."""
    graph = kernel.plan.graph
    return [graph[leaf].size for leaf, _ in kernel.plan.states.values()]


def saved_offsets(saved: Sequence[tuple[int, int]], row: int) -> tuple[list[tuple[int, int]], int]:
    """Where in the memory of a call the kernel keeps what: word and offset of each value, and the end.

    Arguments:
        saved: word and numbers per row of each value; -1 for what isn't read.
        row: bytes of one number for all rows of all steps.
    """
    found, here = [], 0
    for place, size in saved:
        if place >= 0:
            found.append((place, here))
        here += row * size
    return found, here


def give_saved(block: array[int], offsets: Sequence[tuple[int, int]], saved: Tensor) -> None:
    """Write the addresses of what the forward keeps for the backward."""
    start = align_up(saved.data_ptr())
    for place, offset in offsets:
        block[place] = start + offset
