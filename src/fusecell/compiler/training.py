"""Training: a cell's step and its gradient as two kernels, joined to torch's autograd."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.bound import bound
from fusecell.compiler.kernel import Block, Kernel, compile_graph
from fusecell.compiler.ops import LANES
from fusecell.compiler.partition import Halves, partition
from fusecell.compiler.trace import Traced
from fusecell.eager import run_eager
from fusecell.runner import Options, State, steps_of

__all__ = ["Learner", "Training"]


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

    def named(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weights by the names of their leaves."""
        graph = self.traced.graph
        return dict(zip((graph[index].name for index in graph.leaves("weight")), weights, strict=True))

    @property
    def saved_numbers(self) -> int:
        """Numbers kept per row and step, padded to whole vectors."""
        return sum(_padded(size) for _, size in self.halves.saved)


@dataclass(frozen=True)
class _Rows:
    """Which rows take part in which steps; all of them in all where there are no lengths."""

    steps: int
    rows: int
    total: int
    order: Tensor | None = None
    counts: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def of(cls, steps: int, rows: int, lengths: Tensor | None) -> _Rows:
        if lengths is None:
            return cls(steps, rows, steps * rows)
        longest, order = torch.sort(lengths, descending=True, stable=True)
        counts = (longest > torch.arange(steps)[:, None]).sum(1)
        offsets = torch.cumsum(counts, 0) - counts
        return cls(steps, rows, int(counts.sum()), order, counts, offsets)

    def give(self, kernel: Kernel, block: Block) -> None:
        if self.order is not None and self.counts is not None and self.offsets is not None:
            for name, value in (("caller.order", self.order), ("counts", self.counts), ("offsets", self.offsets)):
                block[kernel.at[name]] = value.data_ptr()


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what its forward and its backward have in common."""

    cell: Cell
    training: Training
    options: Options
    rows: _Rows
    counts: tuple[int, ...]
    """How many of the tensors are inputs, states, states to go back to, and weights; what those come from follows."""

    def new_rows(self, like: Tensor, size: int) -> Tensor:
        """Memory for a (T, N, size) result; zero where rows end before the others."""
        new = like.new_empty if self.rows.counts is None else like.new_zeros
        return new(self.rows.steps, self.rows.rows, size)

    def run(self, kernel: Kernel, block: Block, saved: Tensor, *, reverse: bool) -> None:
        """Run a kernel, its block filled but for what forward and backward have in common."""
        here = -(-saved.data_ptr() // 64) * 64
        for name, size in self.training.halves.saved:
            # Each saved value has a region of its own, a row for every row of every step.
            position = kernel.at.get(f"{name}.ptr")
            if position is not None:
                block[position] = here
            here += self.rows.total * _padded(size) * saved.element_size()
        self.rows.give(kernel, block)
        resets = self.options.resets
        if resets is not None:
            at = kernel.at["resets"]
            block[at] = resets.data_ptr()
            block[at + 1], block[at + 2] = resets.stride()
        kernel.run(block, self.rows.steps, self.rows.rows, reverse=reverse)

    def split(self, tensors: Sequence[Tensor]) -> tuple[State, State, State, State, State]:
        """The tensors of a call by what they are."""
        ends = list(accumulate(self.counts))
        inputs, state, resets, weights = (tuple(tensors[a:b]) for a, b in pairwise([0, *ends]))
        return inputs, state, resets, weights, tuple(tensors[ends[-1] :])


class Learner:
    """A cell that can learn: its joint graph, and its kernels for each set of wanted gradients that was met."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._made: dict[tuple[frozenset[str], bool], Training] = {}
        self._lock = threading.Lock()
        weights = [traced.graph[index].name for index in traced.graph.leaves("weight")]
        self._labels = [f"grad.weight.{name}" for name in weights]

    def __call__(
        self, cell: Cell, inputs: State, state: State, options: Options, *, recompute: bool = False
    ) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs with gradients; see :func:`fusecell.eager.run_eager`."""
        weights = self.traced.weights.values(cell)
        labels = [*(f"grad.input.{name}" for name in cell.inputs), *self._labels]
        pairs = zip(labels, (*inputs, *weights), strict=True)
        training = self.training(frozenset(label for label, value in pairs if value.requires_grad), recompute)
        rows = inputs[0].shape[1]
        resets: State = ()
        if options.resets is not None:
            like = state[0] if state else inputs[0]
            resets = tuple(cell.initial_state(rows, dtype=like.dtype, device=like.device))
        call = _Call(
            cell,
            training,
            options,
            _Rows.of(steps_of(inputs), rows, options.lengths),
            (len(inputs), len(state), len(resets), len(weights)),
        )
        originals = self.traced.weights.originals(cell)
        outputs, *after = _Scan.apply(call, *inputs, *state, *resets, *weights, *originals)  # type: ignore[no-untyped-call]
        return outputs, tuple(after)

    def training(self, wanted: frozenset[str], recompute: bool) -> Training:
        """The kernels for some gradients, compiled on first use."""
        found = self._made.get((wanted, recompute))
        if found is None:
            with self._lock:
                found = self._made.get((wanted, recompute))
                if found is None:
                    halves = partition(self.traced.graph, wanted, recompute=recompute)
                    found = Training(self.traced, halves, compile_graph(halves.forward))
                    self._made[wanted, recompute] = found
        return found


class _Scan(torch.autograd.Function):
    """The forward kernel, and the backward kernel as its gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, state, resets, weights, _ = call.split(tensors)
        training, rows = call.training, call.rows
        kernel = training.forward
        block = kernel.block()
        like = state[0] if state else inputs[0]
        saved = like.new_empty(rows.total * training.saved_numbers + 4 * LANES)
        outputs = call.new_rows(like, call.cell.output_size)
        after = tuple(value.new_empty(value.shape) for value in state)
        sequences = {name: _sequence(value) for name, value in zip(call.cell.inputs, inputs, strict=True)}
        _give_leaves(kernel, block, sequences, training.named(weights))
        kernel.sequence(block, "out.output", outputs)
        kept = _give_states(kernel, block, call.cell.states, state, after, resets)
        call.run(kernel, block, saved, reverse=call.options.reverse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)
        del kept
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
    training, cell = call.training, call.cell
    kernel = training.backward
    block = kernel.block()
    output = saved.new_zeros(1, call.rows.rows, cell.output_size) if grads[0] is None else grads[0]
    sequences = {name: _sequence(value) for name, value in zip(cell.inputs, inputs, strict=True)}
    sequences["grad.output"] = _sequence(output)
    named = training.named(weights)
    _give_leaves(kernel, block, sequences, named)
    for_inputs: dict[str, Tensor] = {}
    for_weights: dict[str, Tensor] = {}
    for label in kernel.plan.graph.outputs:
        if label.startswith("grad.input."):
            name = label.removeprefix("grad.input.")
            for_inputs[name] = call.new_rows(saved, sequences[name].shape[2])
            kernel.sequence(block, f"out.{label}", for_inputs[name])
        elif label.startswith("grad.weight."):
            name = label.removeprefix("grad.weight.")
            for_weights[name] = torch.zeros_like(named[name], memory_format=torch.contiguous_format)
            kernel.matrix(block, f"out.{label}", for_weights[name])
    after = [saved.new_zeros(value.shape) if g is None else g for g, value in zip(grads[1:], state, strict=True)]
    before = [saved.new_empty(value.shape) for value in state]
    cut = [saved.new_zeros(value.shape) for value in resets]
    kept = _give_states(kernel, block, [f"grad.{name}" for name in cell.states], after, before, cut)
    call.run(kernel, block, saved, reverse=not call.options.reverse)
    del kept
    found = [_like_input(for_inputs.get(name), value) for name, value in zip(cell.inputs, inputs, strict=True)]
    return [*found, *before, *cut, *map(for_weights.get, named), *[None] * len(originals)]


def _differentiable(
    call: _Call, tensors: list[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that have gradients: torch's own, of the Python loop over the step with the tensors of the forward."""
    aliases = [value.view_as(value) if need else value for value, need in zip(tensors, needed, strict=True)]
    inputs, state, resets, weights, originals = call.split(aliases)
    prologue = call.training.traced.weights
    cell = bound(call.cell, prologue.bindings(weights, originals), resets)
    outputs, after = run_eager(cell, inputs, state, call.options)
    pairs = [(value, grad) for value, grad in zip((outputs, *after), grads, strict=True) if grad is not None]
    pairs = [(value, grad) for value, grad in pairs if value.requires_grad]
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


def _give_leaves(kernel: Kernel, block: Block, sequences: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name in kernel.inputs:
        kernel.sequence(block, f"in.{name}", sequences[name])
    for name in kernel.weights:
        kernel.matrix(block, f"weight.{name}", weights[name])


def _give_states(
    kernel: Kernel, block: Block, names: Sequence[str], first: Sequence[Tensor], last: State | list[Tensor], reset: Any
) -> list[Tensor]:
    """Give the states to start from, to leave and to go back to; returns what must live as long as the call."""
    kept = []
    for kind, values in (("first", first), ("last", last), ("reset", reset)):
        for name, value in zip(names, values, strict=False):
            kept.append(value if value.shape[1] < 2 or value.stride(1) == 1 else value.contiguous())
            kernel.rows(block, f"{kind}.{name}", kept[-1])
    return kept


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


def _sequence(value: Tensor) -> Tensor:
    """An input as (T, N, size), its features side by side."""
    flat = value if value.dim() == 3 else value.reshape(value.shape[0], value.shape[1], -1)
    return flat if flat.shape[2] < 2 or flat.stride(2) == 1 else flat.contiguous()


def _like_input(grad: Tensor | None, value: Tensor) -> Tensor | None:
    """A gradient in its input's shape; one that was the same at all steps has the sum over them."""
    if grad is None:
        return None
    if value.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(value.shape)
