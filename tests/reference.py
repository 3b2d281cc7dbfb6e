"""The reference for lengths, resets and reverse: a Python loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusecell as fc


class LearnedStart(fc.GRUCell):
    """A GRU with a trainable initial state."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.start = nn.Parameter(torch.randn(hidden_size))

    def initial_state(self, batch_size, *, dtype=None, device=None):
        return (self.start.to(dtype=dtype, device=device).expand(batch_size, -1),)


def loop(cell: fc.Cell, x: Tensor, state: tuple[Tensor, ...], lengths=None, resets=None, reverse=False):
    """Run each row by itself in Python, which defines lengths, resets and reverse."""
    steps, rows = x.shape[:2]
    outputs = x.new_zeros(steps, rows, cell.output_size)
    begin = cell.initial_state(rows, dtype=x.dtype)
    after = []
    for n in range(rows):
        now = tuple(value[n : n + 1] for value in state)
        times = range(steps if lengths is None else int(lengths[n]))
        for t in reversed(times) if reverse else times:
            if resets is not None and resets[t, n]:
                now = tuple(value[n : n + 1] for value in begin)
            output, now = cell.step(x[t, n : n + 1], now)
            outputs[t, n] = output[0]
        after.append(now)
    return outputs, tuple(torch.cat(column) for column in zip(*after, strict=True))


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
