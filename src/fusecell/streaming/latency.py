"""How long a stream's steps take, one by one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusecell.streaming.bound_step import Array
from fusecell.streaming.stream import Stream

__all__ = ["Latency", "measure"]


@dataclass(frozen=True)
class Latency:
    """The time of every step of a measurement, in seconds, what reading the clock takes left out.

    Attributes:
        seconds: (steps,), in order.
        clock: what was taken off each.
    """

    seconds: Array
    clock: float

    def quantile(self, share: float) -> float:
        """The time that ``share`` of the steps stay within."""
        return float(np.quantile(self.seconds, share))

    @property
    def longest(self) -> float:
        return float(self.seconds.max())

    def histogram(self, bins: int = 16) -> list[tuple[float, float, int]]:
        """From, to and how many steps, in bins of equal ratio between the fastest step and the slowest."""
        low, high = max(float(self.seconds.min()), 1e-9), max(self.longest, 2e-9)
        edges = np.geomspace(low, max(high, low * 1.001), bins + 1)
        counts, _ = np.histogram(np.clip(self.seconds, low, high), edges)
        return [(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def measure(stream: Stream, steps: int, *, progress: Callable[[int], object] | None = None) -> Latency:
    """Time the steps of a stream, on inputs from a normal distribution.

    Python's garbage collector is off meanwhile, as it should be in a process that answers in real time.

    Arguments:
        stream: goes on from its state.
        steps: how many.
        progress: told how many are done, about a hundred times.
    """
    rows = (stream.batch_size, stream.input_size)
    inputs = np.random.default_rng(0).normal(size=(256, *rows)).astype(stream.dtype)
    out = np.empty((stream.batch_size, stream.output_size), stream.dtype)
    clock, step, ticks = time.perf_counter_ns, stream.step, np.empty(steps, np.int64)
    for index in range(min(steps, 1000)):
        step(inputs[index % 256], out=out)
    alone = min(_nothing(clock) for _ in range(1000))
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
    return Latency(np.maximum(ticks - alone, 1) * 1e-9, alone * 1e-9)


def _nothing(clock: Callable[[], int]) -> int:
    began = clock()
    return clock() - began
