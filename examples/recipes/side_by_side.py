"""What the recipes share: one program, run with torch.nn's layers and with fusecell's in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

Step = Callable[[], float]
"""Makes one step of training and returns its loss."""
Program = Callable[[bool, bool], Step]
"""Builds a model, with fusecell or without, small or as it is; equal but for that, from the same random numbers."""


def run(program: Program, steps: int, *, small: bool = False) -> tuple[list[tuple[float, float]], float]:
    """Run a program's steps with torch.nn and with fusecell in turns, on one core.

    Returns:
        The losses of each step, torch.nn's and fusecell's; and how many times as much processor time torch.nn's steps
        take, the median over all steps but the first, which compiles.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pair = []
        for fusecell in (False, True):
            torch.manual_seed(0)
            np.random.seed(0)
            step = program(fusecell, small)
            pair.append((step, torch.get_rng_state(), np.random.get_state()))
        losses, ratios = [], []
        for _ in range(steps):
            row, seconds = [], []
            for index, (step, torchs, numpys) in enumerate(pair):
                torch.set_rng_state(torchs)  # each draws as if it were alone
                np.random.set_state(numpys)
                began = time.process_time()
                row.append(step())
                seconds.append(time.process_time() - began)
                pair[index] = (step, torch.get_rng_state(), np.random.get_state())
            losses.append((row[0], row[1]))
            ratios.append(seconds[0] / seconds[1])
    finally:
        torch.set_num_threads(threads)
    return losses, statistics.median(ratios[1:] or ratios)


def compare(program: Program, steps: int = 12) -> None:
    """Print the losses of both, and how much faster fusecell's steps are."""
    losses, times = run(program, steps)
    print("step  torch.nn  fusecell")
    for index, (theirs, ours) in enumerate(losses):
        if index in (0, 1, len(losses) // 2, len(losses) - 1):
            print(f"{index:4}  {theirs:8.5f}  {ours:8.5f}")
    worst = max(abs(theirs - ours) / max(abs(theirs), 1e-6) for theirs, ours in losses)
    print(f"losses differ by {worst:.0e} of themselves at most; a step is {times:.2f} times as fast")
