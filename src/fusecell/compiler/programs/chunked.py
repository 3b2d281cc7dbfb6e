"""Training over a long sequence in chunks: their first states are kept, and each is run again in the backward.

With as many chunks as each has steps, what is kept beside the outputs grows with the square root of the steps (Chen et
al., Training deep nets with sublinear memory cost, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecell.compiler.programs.training import Call, Results
from fusecell.execution.options import Options, State

__all__ = ["ChunkedCall", "chunk_steps"]


def chunk_steps(steps: int) -> int:
    """Return the steps of each chunk but the last one run."""
    return max(1, math.ceil(steps / max(1, math.isqrt(steps))))


@dataclass(slots=True)
class ChunkedCall(Call):
    """A call whose forward keeps the states before each chunk, and nothing else."""

    def forward(self, tensors: State) -> Results:
        """Run the forward kernel chunk by chunk; what is saved are the states before each, (chunks, numbers)."""
        _, state, *_ = self.split(tensors)
        sizes = [value.numel() for value in state]
        chunks = self._chunks()
        saved = tensors[0].new_empty(len(chunks), sum(sizes))
        outputs = self._new_rows(tensors[0], *self.output)
        for start, chunk in zip(saved, chunks, strict=True):
            for place, value in zip(start.split(sizes), state, strict=True):
                place.copy_(value.reshape(-1))
            call, of_chunk = self._of_chunk(chunk, tensors, state)
            results = call.new_results(of_chunk)._replace(outputs=outputs[chunk])
            call.run_forward(of_chunk, results)
            state = results.after
        return Results(saved, outputs, state)

    def gradients(self, saved: Tensor, tensors: State, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run each chunk's forward and backward kernels, the last one first; arguments and results as of a call."""
        first, after, _, _ = self.ends
        state, of_output, of_state = self.split(tensors)[1], grads[0], list(grads[1:])
        result: list[Tensor | None] = [None] * len(tensors)
        for start, chunk in zip(reversed(saved), reversed(self._chunks()), strict=True):
            values = start.split([value.numel() for value in state])
            before = tuple([value.view(like.shape) for value, like in zip(values, state, strict=True)])
            call, of_chunk = self._of_chunk(chunk, tensors, before)
            of_outputs = None if of_output is None else of_output[chunk]
            gradients = call.gradients(call.forward(of_chunk).saved, of_chunk, (of_outputs, *of_state))
            of_state = gradients[first:after]
            for index, gradient in enumerate(gradients):
                if gradient is not None and not first <= index < after:
                    is_input = index < first and tensors[index].shape[0] == self.steps
                    result[index] = _joined(result[index], gradient, tensors[index], chunk if is_input else None)
        result[first:after] = of_state
        return result

    def _chunks(self) -> list[slice]:
        """Return the steps of each chunk, in the order in which they are run."""
        return list(_slices(self.steps, reverse=self.options.reverse))

    def _of_chunk(self, chunk: slice, tensors: State, state: State) -> tuple[Call, State]:
        """Return the call of a chunk that begins in a state, and its tensors."""
        inputs, _, reset, weights, originals = self.split(tensors)
        inputs = tuple([value if value.shape[0] != self.steps else value[chunk] for value in inputs])
        options = _options_of(self.options, chunk)
        call = Call.of(self.training, inputs, state, reset, weights, options, self.output)
        return call, (*inputs, *state, *reset, *weights, *originals)


def _joined(whole: Tensor | None, gradient: Tensor, like: Tensor, chunk: slice | None) -> Tensor:
    """Put a chunk's gradient into its place in that of the sequence; without a place, add it."""
    if chunk is None:
        return gradient if whole is None else whole.add_(gradient)
    whole = torch.empty_like(like) if whole is None else whole
    whole[chunk] = gradient
    return whole


def _slices(steps: int, *, reverse: bool) -> Iterator[slice]:
    size = chunk_steps(steps)
    starts = range(0, steps, size)
    for start in reversed(starts) if reverse else starts:
        yield slice(start, min(start + size, steps))


def _options_of(options: Options, chunk: slice) -> Options:
    """Return the options of some of the steps."""
    lengths, resets = options.lengths, options.resets
    if lengths is not None:
        lengths = (lengths - chunk.start).clamp(0, chunk.stop - chunk.start)
    if resets is not None:
        resets = resets[chunk]
    return replace(options, lengths=lengths, resets=resets, recompute=False)
