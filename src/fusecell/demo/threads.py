"""How many threads to train with: measured, as small products on many threads wait more than they work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

__all__ = ["fastest_threads"]


def fastest_threads(work: Callable[[], object], most: int | None = None, repeats: int = 3) -> int:
    """The number of torch threads that runs ``work`` fastest, of 1, 2, 4 ... ``most``; the smaller where it is close.

    Arguments:
        work: run once to warm up and ``repeats`` times to measure, for each number of threads that is not far behind.
        most: the largest number to try; torch's present number if left out.

    Returns:
        The number, which is not put into force.
    """
    before: int = torch.get_num_threads()
    most = before if most is None else most
    candidates: list[int] = sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
    try:
        times: dict[int, float] = {}
        for threads in candidates:
            times[threads] = _seconds(work, threads, repeats, 2 * min(times.values(), default=math.inf))
    finally:
        torch.set_num_threads(before)
    # The smallest that is nearly the fastest: what else runs on the machine delays many threads more than few.
    return next(threads for threads in candidates if times[threads] <= 1.15 * min(times.values()))


def _seconds(work: Callable[[], object], threads: int, repeats: int, hopeless: float) -> float:
    """The median of ``repeats``, or the first that is ``hopeless``: threads that wait for busy cores take very long."""
    torch.set_num_threads(threads)
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
        if times[-1] > hopeless:
            return times[-1]
    return sorted(times)[repeats // 2]
