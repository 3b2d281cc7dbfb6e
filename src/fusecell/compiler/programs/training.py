"""Training's two kernels, a step's forward and its gradient, and what one call of them needs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import align_up, padded
from fusecell.compiler.programs.allocation import new_empty
from fusecell.compiler.programs.launch import RaggedRows, run
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.compiler.transforms.partition import ForwardBackward
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State, steps_of

__all__ = ["Call", "Half", "Training"]


class Half:
    """The forward's or the backward's kernel, and where its block takes what among the tensors of a call.

    Arguments:
        inputs, weights: the names of a call's tensors, of which the kernel reads some.

    Attributes:
        input_indices, weight_indices: which of the tensors by those names the kernel reads, in its order.
        saved: for each value that is kept between the two, its word, -1 if it isn't read, and its numbers per row.
    """

    def __init__(self, kernel: Kernel, inputs: Sequence[str], weights: Sequence[str], halves: ForwardBackward) -> None:
        self.kernel = kernel
        words = kernel.words
        self.input_indices = [inputs.index(name) for name in words.inputs]
        self.weight_indices = [weights.index(name) for name in words.weights]
        self.saved = [(words.saved.get(name, -1), padded(size)) for name, size in halves.saved]

    def give(self, block: array[int], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Give what the kernel reads of the inputs and weights; returns what must live until it returns."""
        kernel = self.kernel
        kept = kernel.give_sequences(block, kernel.words.inputs.values(), [inputs[i] for i in self.input_indices])
        kept += kernel.give_matrices(block, kernel.words.weights.values(), [weights[i] for i in self.weight_indices])
        return kept

    def run(self, call: Call, block: array[int], saved: Tensor, *, reverse: bool) -> None:
        """Run the kernel over a call's block, filled but for what forward and backward have in common."""
        kernel, here = self.kernel, align_up(saved.data_ptr())
        if call.options.resets is not None:
            kernel.give_resets(block, call.options.resets)
        # Each value that is saved has a region of its own, a row for every row of every step.
        row = call.all_rows * kernel.itemsize
        for place, size in self.saved:
            if place >= 0:
                block[place] = here
            here += row * size
        run(kernel, block, call.steps, call.rows, reverse, call.ragged)


class Training:
    """The kernels of a cell that learns, for one set of wanted gradients.

    Arguments:
        inputs, weights: the names of a call's tensors, in order.
        about: what they are the kernels of, for ``FUSECELL_DEBUG``.
    """

    def __init__(
        self, inputs: Sequence[str], weights: Sequence[str], halves: ForwardBackward, about: str = "step"
    ) -> None:
        self.halves = halves
        self._inputs = (*inputs, "grad.output")
        self._weights = tuple(weights)
        self.forward = self._half(compile_graph(halves.forward, about=f"{about}, forward"))
        self.backward = self._half(compile_graph(halves.backward, backward=True, about=f"{about}, backward"))
        self.saved_numbers = sum(size for _, size in self.forward.saved)

    def _half(self, kernel: Kernel) -> Half:
        return Half(kernel, self._inputs, self._weights, self.halves)

    def saved_size(self, all_rows: int) -> int:
        """The numbers that are kept for so many rows of all steps, and room to align them."""
        return all_rows * self.saved_numbers + 4 * LANES

    @cached_property
    def results(self) -> _Results:
        """What the backward makes."""
        words, plan = self.backward.kernel.words, self.backward.kernel.plan
        covered, names = plan.covered(), self._weights
        return _Results(
            [self._inputs.index(label.removeprefix("grad.input.")) for label in words.outputs],
            [names.index(label.removeprefix("grad.weight.")) for label in words.sums],
            [label in covered for label in words.sums],
        )


@dataclass(frozen=True)
class _Results:
    """The gradients that a backward makes: of which inputs, of which weights, and which of those it fills whole."""

    inputs: list[int]
    weights: list[int]
    fills: list[bool]


@dataclass(slots=True)
class Call:
    """One call of a layer: what its forward and its backward have in common."""

    training: Training
    options: Options
    steps: int
    rows: int
    ragged: RaggedRows | None
    all_rows: int
    """The rows of all steps together."""
    ends: tuple[int, int, int, int]
    """Where among the tensors inputs, states, states to go back to, and weights end; what weights come from follows."""

    @classmethod
    def of(
        cls, training: Training, inputs: State, state: State, resets: State, weights: State, options: Options
    ) -> Call:
        """A call with these tensors; ``resets`` are the states to go back to, if any."""
        steps, rows = steps_of(inputs), inputs[0].shape[1]
        ragged = None if options.lengths is None else RaggedRows.of(options.lengths, steps)
        all_rows = steps * rows if ragged is None else ragged.all_rows
        a = len(inputs)
        b = a + len(state)
        c = b + len(resets)
        return cls(training, options, steps, rows, ragged, all_rows, (a, b, c, c + len(weights)))

    def split(self, tensors: State) -> tuple[State, State, State, State, State]:
        """The tensors of a call by what they are."""
        a, b, c, d = self.ends
        return tensors[:a], tensors[a:b], tensors[b:c], tensors[c:d], tensors[d:]

    def _new_rows(self, like: Tensor, size: int) -> Tensor:
        """Memory for a (T, N, size) result; zero where rows end before the others."""
        if self.options.lengths is None:
            return new_empty(like, self.steps, self.rows, size)
        return like.new_zeros(self.steps, self.rows, size)

    @one_thread_after_fork()
    def forward(self, tensors: State) -> tuple[Tensor, Tensor, State]:
        """The forward kernel: what it saves, the outputs, and the states after the last step."""
        inputs, state, resets, weights, _ = self.split(tensors)
        half, like = self.training.forward, inputs[0]
        kernel = half.kernel
        words, block = kernel.words, kernel.block()
        saved = new_empty(like, self.training.saved_size(self.all_rows))
        outputs = self._new_rows(like, self.training.forward.kernel.output_sizes["output"])
        after = tuple([value.new_empty(value.shape) for value in state])
        kept = [half.give(block, inputs, weights), kernel.give_states(block, words.first, state)]
        kernel.give_sequences(block, words.outputs.values(), (outputs,))
        kernel.give_states(block, words.last, after)
        if resets:
            kept.append(kernel.give_states(block, words.reset, resets))
        half.run(self, block, saved, reverse=self.options.reverse)
        return saved, outputs, after

    @one_thread_after_fork()
    def gradients(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The backward kernel; the gradients in the order of ``tensors``."""
        inputs, state, resets, weights, _ = self.split(tensors)
        half = self.training.backward
        kernel = half.kernel
        words, block = kernel.words, kernel.block()
        output = (
            saved.new_zeros(1, self.rows, self.training.forward.kernel.output_sizes["output"])
            if grads[0] is None
            else grads[0]
        )
        after = [saved.new_zeros(value.shape) if g is None else g for g, value in zip(grads[1:], state, strict=True)]
        kept = [half.give(block, (*inputs, output), weights), kernel.give_states(block, words.first, after)]
        result: list[Tensor | None] = [None] * len(tensors)
        start, first, second, _ = self.ends
        result[start:first] = before = [saved.new_empty(value.shape) for value in state]
        kernel.give_states(block, words.last, before)
        if resets:
            result[first:second] = cut = [saved.new_zeros(value.shape) for value in resets]
            kernel.give_states(block, words.reset, cut)
        results = self.training.results
        made = [self._new_rows(saved, inputs[index][0, 0].numel()) for index in results.inputs]
        kernel.give_sequences(block, words.outputs.values(), made)
        sums = self._new_sums(saved, weights)
        kernel.give_matrices(block, words.sums.values(), sums)
        half.run(self, block, saved, reverse=not self.options.reverse)
        del kept
        for total, index in zip(sums, results.weights, strict=True):
            result[second + index] = total
        for index, grad in zip(results.inputs, made, strict=True):
            result[index] = _like_input(grad, inputs[index])
        return result

    def _new_sums(self, like: Tensor, weights: State) -> list[Tensor]:
        """Memory for the gradients of weights; zero where the kernel fills but some of one."""
        results = self.training.results
        pairs = zip(results.weights, results.fills, strict=True)
        return [(like.new_empty if fills else like.new_zeros)(weights[index].shape) for index, fills in pairs]


def _like_input(grad: Tensor, value: Tensor) -> Tensor:
    """A gradient in its input's shape; one that was the same at all steps has the sum over them."""
    if value.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(value.shape)
