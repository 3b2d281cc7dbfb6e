"""Measure the number of threads with which training is fastest; for small products that is often one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

__all__ = ["fastest_threads"]


def fastest_threads(work: Callable[[], object], most: int | None = None, repeats: int = 3) -> int:
    """Return the number of torch threads with which ``work`` is fastest; where it is close, the smallest.

    Arguments:
        work: called once to warm up and then ``repeats`` times, for each number of threads.
        most: the largest number to try, of 1, 2, 4 ... and itself; torch's present number if left out.
        repeats: the number of calls whose median counts; a number that is hopelessly slow gets fewer.

    Returns:
        The number of threads. Torch's own is the same after the call as before.
    """
    present: int = torch.get_num_threads()
    most = present if most is None else most
    candidates: list[int] = sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
    try:
        times: dict[int, float] = {}
        for threads in candidates:
            # Twice the best so far is hopeless: a slow machine needn't measure it again.
            times[threads] = _seconds(work, threads, repeats, 2 * min(times.values(), default=math.inf))
    finally:
        torch.set_num_threads(present)
    # The smallest that is nearly the fastest: load from other processes delays many threads more than few.
    return next(threads for threads in candidates if times[threads] <= 1.15 * min(times.values()))


def _seconds(work: Callable[[], object], threads: int, repeats: int, hopeless: float) -> float:
    """Return the median time of ``repeats`` calls, or the first time above ``hopeless`` without any more calls."""
    torch.set_num_threads(threads)
    work()  # starts the threads, which takes longer than a call
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
        if times[-1] > hopeless:
            return times[-1]
    return sorted(times)[repeats // 2]
