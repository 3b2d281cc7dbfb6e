"""Training: a cell's step and its gradient as two kernels, joined to torch's autograd."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.bound import bound
from fusecell.compiler.kernel import Kernel, RaggedRows, compile_graph
from fusecell.compiler.ops import LANES
from fusecell.compiler.partition import Halves, partition
from fusecell.compiler.trace import Refusal, Traced, trace
from fusecell.eager import run_eager
from fusecell.runner import Options, State, recomputing, steps_of

__all__ = ["Learner", "Training", "compile_learner"]


@dataclass
class Training:
    """The kernels of a cell that learns, for one set of wanted gradients; the backward is compiled on first use."""

    traced: Traced
    halves: Halves
    forward: Kernel

    @cached_property
    def backward(self) -> Kernel:
        """The kernel of the gradient."""
        return compile_graph(self.halves.backward, backward=True)

    @cached_property
    def saved(self) -> tuple[tuple[str, int], ...]:
        """Each kept value's name, and its numbers per row and step, padded to whole vectors."""
        return tuple((name, -(-size // LANES) * LANES) for name, size in self.halves.saved)

    @cached_property
    def saved_numbers(self) -> int:
        """Numbers kept per row and step in all."""
        return sum(size for _, size in self.saved)


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what its forward and its backward have in common."""

    cell: Cell
    training: Training
    options: Options
    steps: int
    rows: int
    ragged: RaggedRows | None
    ends: tuple[int, ...]
    """Where among the tensors inputs, states, states to go back to, and weights end; what weights come from follows."""

    def split(self, tensors: Sequence[Tensor]) -> tuple[State, State, State, State, State]:
        """The tensors of a call by what they are."""
        a, b, c, d = self.ends
        return tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b:c]), tuple(tensors[c:d]), tuple(tensors[d:])

    @cached_property
    def all_rows(self) -> int:
        """The rows of all steps."""
        return self.steps * self.rows if self.ragged is None else int(self.ragged.counts.sum())

    def new_rows(self, like: Tensor, size: int) -> Tensor:
        """Memory for a (T, N, size) result; zero where rows end before the others."""
        new = like.new_empty if self.ragged is None else like.new_zeros
        return new(self.steps, self.rows, size)

    def run(self, kernel: Kernel, block: array[int], saved: Tensor, *, reverse: bool) -> None:
        """Run a kernel, its block filled but for what forward and backward have in common."""
        here = -(-saved.data_ptr() // 64) * 64
        places = kernel.words.saved
        for name, size in self.training.saved:
            # Each saved value has a region of its own, a row for every row of every step.
            if name in places:
                block[places[name]] = here
            here += self.all_rows * size * kernel.itemsize
        if self.ragged is not None:
            kernel.give_ragged(block, self.ragged)
        if self.options.resets is not None:
            kernel.give_resets(block, self.options.resets)
        kernel.run(block, self.steps, self.rows, reverse, saved)


class Learner:
    """A cell that can learn: its joint graph, and its kernels for each set of wanted gradients that was met."""

    def __init__(self, traced: Traced, inputs: Sequence[str]) -> None:
        self.traced = traced
        names = traced.weight_names
        self._labels = (*(f"grad.input.{name}" for name in inputs), *(f"grad.weight.{name}" for name in names))
        self._made: dict[tuple[bool, ...], Training] = {}
        self._lock = threading.Lock()

    def __call__(self, cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs with gradients; see :func:`fusecell.eager.run_eager`."""
        prologue = self.traced.weights
        weights = prologue.values(cell)
        flags = tuple([value.requires_grad for value in (*inputs, *weights)])
        recompute = options.recompute or recomputing()
        training = self._made.get((recompute, *flags)) or self.training(flags, recompute)
        steps, rows = steps_of(inputs), inputs[0].shape[1]
        resets: State = ()
        if options.resets is not None:
            resets = tuple(cell.initial_state(rows, dtype=inputs[0].dtype, device=inputs[0].device))
        ragged = None if options.lengths is None else RaggedRows.of(options.lengths, steps)
        ends = tuple(accumulate((len(inputs), len(state), len(resets), len(weights))))
        call = _Call(cell, training, options, steps, rows, ragged, ends)
        tensors = (*inputs, *state, *resets, *weights, *prologue.originals(cell))
        outputs, *after = _Scan.apply(call, *tensors)  # type: ignore[no-untyped-call]
        return outputs, tuple(after)

    def training(self, flags: Sequence[bool], recompute: bool) -> Training:
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
                self._made[key] = Training(self.traced, halves, compile_graph(halves.forward))
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
        kernel = call.training.forward
        words, block = kernel.words, kernel.block()
        like = inputs[0]
        saved = like.new_empty(call.all_rows * call.training.saved_numbers + 4 * LANES)
        outputs = call.new_rows(like, call.cell.output_size)
        after = tuple([value.new_empty(value.shape) for value in state])
        kept: list[object] = _give_leaves(
            call, kernel, block, dict(zip(call.cell.inputs, inputs, strict=True)), weights
        )
        kernel.give_sequence(block, words.outputs["output"], outputs)
        kept.append(kernel.give_states(block, words.first, state))
        kernel.give_states(block, words.last, after)
        if resets:
            kept.append(kernel.give_states(block, words.reset, resets))
        call.run(kernel, block, saved, reverse=call.options.reverse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)
        return outputs, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        call: _Call = ctx.call
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled():
            return None, *_differentiable(call, tensors, grads, ctx.needs_input_grad[1:])
        return None, *_gradients(call, saved, tensors, grads)


def _gradients(
    call: _Call, saved: Tensor, tensors: list[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The backward kernel; the gradients in the order of ``tensors``."""
    inputs, state, resets, weights, originals = call.split(tensors)
    cell, kernel = call.cell, call.training.backward
    words, block = kernel.words, kernel.block()
    output = saved.new_zeros(1, call.rows, cell.output_size) if grads[0] is None else grads[0]
    sequences = dict(zip((*cell.inputs, "grad.output"), (*inputs, output), strict=True))
    kept: list[object] = _give_leaves(call, kernel, block, sequences, weights)
    for_inputs = {}
    for label, places in words.outputs.items():
        name = label.removeprefix("grad.input.")
        for_inputs[name] = call.new_rows(saved, sequences[name][0, 0].numel())
        kernel.give_sequence(block, places, for_inputs[name])
    names = call.training.traced.weight_names
    for_weights = {}
    for label, places in words.sums.items():
        name = label.removeprefix("grad.weight.")
        for_weights[name] = torch.zeros_like(weights[names.index(name)], memory_format=torch.contiguous_format)
        kernel.give_matrix(block, places, for_weights[name])
    after = [saved.new_zeros(value.shape) if g is None else g for g, value in zip(grads[1:], state, strict=True)]
    before = [saved.new_empty(value.shape) for value in state]
    cut = [saved.new_zeros(value.shape) for value in resets]
    kept += [after, kernel.give_states(block, words.first, after)]
    kernel.give_states(block, words.last, before)
    if resets:
        kernel.give_states(block, words.reset, cut)
    call.run(kernel, block, saved, reverse=not call.options.reverse)
    found = [_like_input(for_inputs.get(name), value) for name, value in zip(cell.inputs, inputs, strict=True)]
    return [*found, *before, *cut, *map(for_weights.get, names), *[None] * len(originals)]


def _give_leaves(
    call: _Call, kernel: Kernel, block: array[int], sequences: dict[str, Tensor], weights: State
) -> list[object]:
    """Give what a kernel reads of the inputs and weights; returns what must live until it returns."""
    words = kernel.words
    kept: list[object] = [kernel.give_sequence(block, places, sequences[name]) for name, places in words.inputs.items()]
    for name, value in zip(call.training.traced.weight_names, weights, strict=True):
        places = words.weights.get(name)
        if places is not None:
            kept.append(kernel.give_matrix(block, places, value))
    return kept


def _like_input(grad: Tensor | None, value: Tensor) -> Tensor | None:
    """A gradient in its input's shape; one that was the same at all steps has the sum over them."""
    if grad is None:
        return None
    if value.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(value.shape)


def _differentiable(
    call: _Call, tensors: list[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that have gradients: torch's own, of the Python loop over the step with the tensors of the forward."""
    # Aliases, so that a tensor that went in twice gets both of its gradients once.
    aliases = [value.view_as(value) if need else value for value, need in zip(tensors, needed, strict=True)]
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
