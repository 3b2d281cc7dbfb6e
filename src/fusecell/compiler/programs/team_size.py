"""Decide how many threads a call is worth, from the time that it takes on one."""

from __future__ import annotations

import torch

from fusecell.compiler.backend import tuning
from fusecell.compiler.codegen import MIN_ROWS_PER_THREAD
from fusecell.compiler.runtime.kernel import Kernel
from fusecell.compiler.runtime.thread_team import backs_off

__all__ = ["is_worth_team", "step_us", "team_size"]


def is_worth_team(kernel: Kernel, steps: int, rows: int) -> bool:
    """Whether a call is long enough for more than one thread."""
    return step_us(kernel, rows) * steps >= tuning.TUNING.team_call_us


def team_size(kernel: Kernel, steps: int, rows: int) -> int:
    """Return how many of the threads that torch would take a call is worth."""
    threads = torch.get_num_threads() if is_worth_team(kernel, steps, rows) else 1
    if threads == 1 or backs_off():
        return 1
    # With few rows each, threads divide the columns of a step, and meet at a barrier in every one of them.
    if rows < MIN_ROWS_PER_THREAD * threads and step_us(kernel, rows) < tuning.TUNING.team_step_us:
        return 1
    return threads


def step_us(kernel: Kernel, rows: int) -> float:
    """Estimate the microseconds of a step on one thread.

    A roofline: products of the loop take as long as reading their weights or as multiplying by them, whichever is
    longer. All other products are done for many steps at once, so that reading their weights is shared.
    """
    item, rates = kernel.itemsize, tuning.TUNING
    macs_per_us = 4 * rates.macs_per_us  # times the bytes of a number: of float64 half as many
    loop = max(kernel.loop_macs * item / rates.bytes_per_us, rows * kernel.loop_macs * item / macs_per_us)
    return loop + rows * (kernel.macs - kernel.loop_macs) * item / macs_per_us
