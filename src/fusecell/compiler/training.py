"""Training: a cell's step and its gradient as two kernels, joined to torch's autograd."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.bound import bound
from fusecell.compiler.kernel import Kernel, RaggedRows, compile_graph
from fusecell.compiler.ops import LANES
from fusecell.compiler.partition import Halves, partition
from fusecell.compiler.program import refusal
from fusecell.compiler.trace import Refusal, Traced, trace
from fusecell.eager import run_eager
from fusecell.errors import CompilerError
from fusecell.runner import Options, State, recomputing, steps_of

__all__ = ["Learner", "Training", "compile_learner"]


class Half:
    """The forward's or the backward's kernel, and where its block takes what among the tensors of a call.

    Arguments:
        inputs, weights: the names of a call's tensors, of which the kernel reads some.

    Attributes:
        saved: for each value that is kept between the two, its word, -1 if it isn't read, and its numbers per row.
    """

    def __init__(self, kernel: Kernel, inputs: Sequence[str], weights: Sequence[str], halves: Halves) -> None:
        self.kernel = kernel
        words = kernel.words
        self._inputs = [inputs.index(name) for name in words.inputs]
        self._weights = [weights.index(name) for name in words.weights]
        self.saved = [(words.saved.get(name, -1), -(-size // LANES) * LANES) for name, size in halves.saved]

    def give(self, block: array[int], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Give what the kernel reads of the inputs and weights; returns what must live until it returns."""
        kernel = self.kernel
        kept = kernel.give_sequences(block, kernel.words.inputs.values(), [inputs[i] for i in self._inputs])
        kept += kernel.give_matrices(block, kernel.words.weights.values(), [weights[i] for i in self._weights])
        return kept

    def run(self, call: _Call, block: array[int], saved: Tensor, *, reverse: bool) -> None:
        """Run a kernel whose block is filled but for what forward and backward have in common."""
        kernel, here = self.kernel, -(-saved.data_ptr() // 64) * 64
        # Each saved value has a region of its own, a row for every row of every step.
        row = call.all_rows * kernel.itemsize
        for place, size in self.saved:
            if place >= 0:
                block[place] = here
            here += row * size
        if call.ragged is not None:
            kernel.give_ragged(block, call.ragged)
        if call.options.resets is not None:
            kernel.give_resets(block, call.options.resets)
        kernel.run(block, call.steps, call.rows, reverse)


class Training:
    """The kernels of a cell that learns, for one set of wanted gradients."""

    def __init__(self, traced: Traced, inputs: Sequence[str], halves: Halves) -> None:
        self.traced = traced
        self.halves = halves
        self._inputs = (*inputs, "grad.output")
        self.forward = self._half(compile_graph(halves.forward))
        self.backward = self._half(compile_graph(halves.backward, backward=True))
        self.saved_numbers = sum(size for _, size in self.forward.saved)

    def _half(self, kernel: Kernel) -> Half:
        return Half(kernel, self._inputs, self.traced.weight_names, self.halves)

    @cached_property
    def results(self) -> _Results:
        """What the backward makes."""
        words, plan = self.backward.kernel.words, self.backward.kernel.plan
        covered, names = plan.covered(), self.traced.weight_names
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
class _Call:
    """One call of a layer: what its forward and its backward have in common."""

    cell: Cell
    training: Training
    options: Options
    steps: int
    rows: int
    all_rows: int
    """The rows of all steps together."""
    ragged: RaggedRows | None
    ends: tuple[int, int, int, int]
    """Where among the tensors inputs, states, states to go back to, and weights end; what weights come from follows."""

    def split(self, tensors: State) -> tuple[State, State, State, State, State]:
        """The tensors of a call by what they are."""
        a, b, c, d = self.ends
        return tensors[:a], tensors[a:b], tensors[b:c], tensors[c:d], tensors[d:]

    def new_rows(self, like: Tensor, size: int) -> Tensor:
        """Memory for a (T, N, size) result; zero where rows end before the others."""
        new = like.new_empty if self.ragged is None else like.new_zeros
        return new(self.steps, self.rows, size)


class Learner:
    """A cell that can learn: its joint graph, and its kernels for each set of wanted gradients that was met."""

    def __init__(self, traced: Traced, inputs: Sequence[str]) -> None:
        self.traced = traced
        self._inputs = tuple(inputs)
        names = traced.weight_names
        self._labels = (*(f"grad.input.{name}" for name in inputs), *(f"grad.weight.{name}" for name in names))
        self._made: dict[tuple[bool, ...], Training | Refusal] = {}
        self._lock = threading.Lock()

    def __call__(self, cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State] | Refusal:
        """Run over (T, N, ...) inputs with gradients; see :func:`fusecell.eager.run_eager`."""
        prologue = self.traced.weights
        weights = prologue.values(cell)
        flags = tuple([value.requires_grad for value in (*inputs, *weights)])
        recompute = options.recompute or recomputing()
        training = self._made.get((recompute, *flags)) or self.training(flags, recompute)
        if isinstance(training, Refusal):
            return training
        steps, rows = steps_of(inputs), inputs[0].shape[1]
        all_rows, ragged = steps * rows, None
        if options.lengths is not None:
            ragged = RaggedRows.of(options.lengths, steps)
            all_rows = int(ragged.counts.sum())
        resets: State = ()
        if options.resets is not None:
            resets = tuple(cell.initial_state(rows, dtype=inputs[0].dtype, device=inputs[0].device))
        a = len(inputs)
        b = a + len(state)
        c = b + len(resets)
        call = _Call(cell, training, options, steps, rows, all_rows, ragged, (a, b, c, c + len(weights)))
        outputs, *after = _apply(call, *inputs, *state, *resets, *weights, *prologue.originals(cell))
        return outputs, tuple(after)

    def training(self, flags: Sequence[bool], recompute: bool) -> Training | Refusal:
        """The kernels for some gradients, compiled on first use.

        Arguments:
            flags: for each input, then each weight, whether its gradient is wanted.
            recompute: keep the states only, and compute everything else again in the backward.
        """
        key = (recompute, *flags)
        with self._lock:
            if key not in self._made:
                wanted = [label for label, flag in zip(self._labels, flags, strict=True) if flag]
                halves = partition(self.traced.graph, wanted, recompute=recompute)
                try:
                    self._made[key] = Training(self.traced, self._inputs, halves)
                except (CompilerError, AssertionError, LookupError) as error:
                    self._made[key] = refusal(error)
            return self._made[key]


def compile_learner(cell: Cell, features: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Learner | Refusal:
    """Trace a cell's step and its gradient.

    Arguments:
        features: the feature shape of each input, what follows (T, N).
    """
    traced = trace(cell, features, dtype, gradients=True)
    return traced if isinstance(traced, Refusal) else Learner(traced, cell.inputs)


class _Scan(torch.autograd.Function):
    """The forward kernel, and the backward kernel as its gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, state, resets, weights, _ = call.split(tensors)
        half, like = call.training.forward, inputs[0]
        kernel = half.kernel
        words, block = kernel.words, kernel.block()
        saved = like.new_empty(call.all_rows * call.training.saved_numbers + 4 * LANES)
        outputs = call.new_rows(like, call.cell.output_size)
        after = tuple([value.new_empty(value.shape) for value in state])
        kept = [half.give(block, inputs, weights), kernel.give_states(block, words.first, state)]
        kernel.give_sequences(block, words.outputs.values(), (outputs,))
        kernel.give_states(block, words.last, after)
        if resets:
            kept.append(kernel.give_states(block, words.reset, resets))
        half.run(call, block, saved, reverse=call.options.reverse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)
        return outputs, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: State = ctx.saved_tensors
        saved, tensors = found[0], found[1:]
        call: _Call = ctx.call
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled():
            return None, *_differentiable(call, tensors, grads, ctx.needs_input_grad[1:])
        return None, *_gradients(call, saved, tensors, grads)


# Past the wrapper that looks for transforms of torch.func: a call under one doesn't come here.
_apply: Any = super(torch.autograd.Function, _Scan).apply


def _gradients(call: _Call, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The backward kernel; the gradients in the order of ``tensors``."""
    inputs, state, resets, weights, _ = call.split(tensors)
    half = call.training.backward
    kernel = half.kernel
    words, block = kernel.words, kernel.block()
    output = saved.new_zeros(1, call.rows, call.cell.output_size) if grads[0] is None else grads[0]
    after = [saved.new_zeros(value.shape) if g is None else g for g, value in zip(grads[1:], state, strict=True)]
    kept = [half.give(block, (*inputs, output), weights), kernel.give_states(block, words.first, after)]
    result: list[Tensor | None] = [None] * len(tensors)
    start, first, second, _ = call.ends
    result[start:first] = before = [saved.new_empty(value.shape) for value in state]
    kernel.give_states(block, words.last, before)
    if resets:
        result[first:second] = cut = [saved.new_zeros(value.shape) for value in resets]
        kernel.give_states(block, words.reset, cut)
    results = call.training.results
    made = [call.new_rows(saved, inputs[index][0, 0].numel()) for index in results.inputs]
    kernel.give_sequences(block, words.outputs.values(), made)
    sums = []
    for index, fills in zip(results.weights, results.fills, strict=True):
        result[second + index] = grad = (saved.new_empty if fills else saved.new_zeros)(weights[index].shape)
        sums.append(grad)
    kernel.give_matrices(block, words.sums.values(), sums)
    half.run(call, block, saved, reverse=not call.options.reverse)
    del kept
    for index, grad in zip(results.inputs, made, strict=True):
        result[index] = _like_input(grad, inputs[index])
    return result


def _like_input(grad: Tensor, value: Tensor) -> Tensor:
    """A gradient in its input's shape; one that was the same at all steps has the sum over them."""
    if value.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(value.shape)


def _differentiable(
    call: _Call, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that have gradients: torch's own, of the Python loop over the step with the tensors of the forward."""
    # Aliases, so that a tensor that went in twice gets both of its gradients once.
    aliases = tuple(value.view_as(value) if need else value for value, need in zip(tensors, needed, strict=True))
    inputs, state, resets, weights, originals = call.split(aliases)
    prologue = call.training.traced.weights
    cell = bound(call.cell, prologue.bindings(weights, originals), resets)
    outputs, after = run_eager(cell, inputs, state, call.options)
    pairs = [
        (value, grad)
        for value, grad in zip((outputs, *after), grads, strict=True)
        if grad is not None and value.requires_grad
    ]
    chosen = [index for index, need in enumerate(needed) if need]
    found = torch.autograd.grad(
        [value for value, _ in pairs],
        [aliases[index] for index in chosen],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    result: list[Tensor | None] = [None] * len(tensors)
    for index, grad in zip(chosen, found, strict=True):
        result[index] = grad
    return result
