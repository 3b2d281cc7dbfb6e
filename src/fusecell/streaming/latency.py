"""Measure the latency of a stream's steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusecell.streaming.bound_step import Array
from fusecell.streaming.row_layout import split_row
from fusecell.streaming.stream import Stream

__all__ = ["Latency", "measure"]


@dataclass(frozen=True)
class Latency:
    """The times of a stream's steps.

    Attributes:
        seconds: (steps,), in order, without the time of reading the clock.
        clock: seconds of reading the clock, already subtracted.
    """

    seconds: Array
    clock: float

    def quantile(self, share: float) -> float:
        """Return the time in seconds that a share of the steps, 0 to 1, doesn't exceed."""
        return float(np.quantile(self.seconds, share))

    @property
    def longest(self) -> float:
        """The time of the slowest step, in seconds."""
        return float(self.seconds.max())

    def histogram(self, bins: int = 16) -> list[tuple[float, float, int]]:
        """Count steps in bins of equal ratio between the fastest and the slowest: (low, high, count) each."""
        low, high = max(float(self.seconds.min()), 1e-9), max(self.longest, 2e-9)
        edges = np.geomspace(low, max(high, low * 1.001), bins + 1)
        counts, _ = np.histogram(np.clip(self.seconds, low, high), edges)
        return [(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def measure(stream: Stream, steps: int, *, progress: Callable[[int], object] | None = None) -> Latency:
    """Time the steps of a stream one by one, on normally distributed inputs.

    Python's garbage collector is off meanwhile, as it should be in a process that answers in real time.

    Arguments:
        stream: any stream; its state advances.
        steps: the number of steps to time, after up to 1000 to warm up.
        progress: called about a hundred times with the number of steps done.
    """
    part = stream.parts[0]
    rows = np.random.default_rng(0).normal(size=(256, stream.batch_size, part.input_size)).astype(stream.dtype)
    inputs = [split_row(row, part.row_shapes.input) for row in rows]
    out = stream.step(inputs[0])
    # Local names and 256 inputs made before: the loop is to time steps and nothing else.
    clock, step, ticks = time.perf_counter_ns, stream.step, np.empty(steps, np.int64)
    for index in range(min(steps, 1000)):
        step(inputs[index % 256], out=out)
    overhead = min(_clock_ticks(clock) for _ in range(1000))
    every = max(steps // 100, 1)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(steps):
            x = inputs[index % 256]
            began = clock()
            step(x, out=out)
            ticks[index] = clock() - began
            if progress is not None and index % every == 0:
                progress(index)
    finally:
        if collecting:
            gc.enable()
    return Latency(np.maximum(ticks - overhead, 1) * 1e-9, overhead * 1e-9)


def _clock_ticks(clock: Callable[[], int]) -> int:
    """Return the nanoseconds between two readings of the clock."""
    began = clock()
    return clock() - began
