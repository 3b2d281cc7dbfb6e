"""Measure one shape: compare every contestant's numbers with the reference, then time all in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import fusecell as fc
from benchmarks.clock import Timing, take_turns
from benchmarks.peers import OURS, Peer
from benchmarks.problem import Array, Call, Problem, make_problem
from benchmarks.shapes import Mode, Shape
from fusecell.errors import NotCompilable

__all__ = ["Row", "measure"]

# Float32 against float64 over a hundred steps; a wrong gate is wrong by a thousand times this.
_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Row:
    """The results of a shape.

    Attributes:
        shape, mode: what was run.
        timings: by contestant's name.
        errors: the largest difference from float64 by contestant's name; of a gradient, relative to its largest value.
        refused: why ours can't be compiled and is missing from ``timings``; empty if it can.
        core_share: processor time over wall time while timing; on one core, well below 1 means that other processes
            used it.
    """

    shape: Shape
    mode: Mode
    timings: dict[str, Timing]
    errors: dict[str, float]
    refused: str = ""
    core_share: float = 1.0

    def microseconds(self, name: str) -> float | None:
        """Return the median time of one time step; None if the contestant did not run."""
        return self.timings[name].median / self.shape.steps * 1e6 if name in self.timings else None

    def best_peer(self) -> str | None:
        """Return the name of the fastest contestant other than ours; None if there is none."""
        others = [name for name in self.timings if name != OURS.name]
        return min(others, key=lambda name: self.timings[name].median, default=None)

    def ratio(self) -> float | None:
        """Return the best peer's time over ours: above 1 ours is faster."""
        fusecell, best = self.microseconds(OURS.name), self.best_peer()
        peer = self.microseconds(best) if best else None
        return peer / fusecell if fusecell and peer else None


def measure(shape: Shape, mode: Mode, peers: Sequence[Peer], threads: int, seconds: float) -> Row:
    """Build, compare and time ours and ``peers`` on a shape.

    Arguments:
        shape, mode: what to run.
        peers: the other contestants; those that can't run it are left out.
        threads: of each contestant.
        seconds: of timing, all contestants together.

    Raises:
        ArithmeticError: if a contestant's numbers differ from the reference.
    """
    problem = make_problem(shape, mode)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    refused = ""
    # The compiled runner, which raises: a silent fallback to the Python loop would be timed as fusecell.
    with torch.inference_mode(not mode.training), fc.runner("compiled"):
        for peer in (OURS, *peers):
            call = peer.build(problem, threads)
            if call is None:
                continue
            try:
                arrays = peer.arrays(problem, call())
            except NotCompilable as reason:
                refused = str(reason)
                continue
            errors[peer.name] = _error(peer.name, problem, arrays)
            calls[peer.name] = call
        wall, processor = time.perf_counter(), time.process_time()
        timings = take_turns(calls, seconds / len(calls), threads=threads) if calls else {}
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    return Row(shape, mode, timings, errors, refused, share)


def _error(name: str, problem: Problem, arrays: Mapping[str, Array]) -> float:
    """Return the largest error of a contestant's arrays, or raise ArithmeticError."""
    if arrays.keys() != problem.answer.keys():
        raise ArithmeticError(
            f"{name} on {problem.shape.name}: gave {sorted(arrays)}, expected {sorted(problem.answer)}."
        )
    return max(_compare(f"{name} on {problem.shape.name}", problem, each, arrays[each]) for each in problem.answer)


def _compare(where: str, problem: Problem, name: str, array: Array) -> float:
    answer = problem.answer[name]
    if array.shape != answer.shape:
        raise ArithmeticError(f"{where}: {name} of {array.shape}, expected {answer.shape}.")
    error, largest = float(np.abs(array - answer).max()), float(np.abs(answer).max())
    # Gradients are sums over all steps and rows, so their size is arbitrary; outputs are about 1.
    error, bound = (error / largest, _TOLERANCE) if problem.mode.training else (error, _TOLERANCE * max(1.0, largest))
    if not error <= bound:  # NaN too
        raise ArithmeticError(f"{where}: {name} is off by {error:.2g}, expected at most {bound:.2g}.")
    return error
