"""One shape: every contestant's numbers compared with the answer, then all timed by turns."""

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
    """What was found for a shape.

    Attributes:
        shape, mode: of what.
        timings: by contestant's name.
        errors: the largest differences from float64, by contestant; of a gradient, relative to its largest value.
        refused: why ours was not compiled and is missing from ``timings``; empty if it was.
        core_share: processor time over wall time while timing; on one core, well below 1 says that others used it.
    """

    shape: Shape
    mode: Mode
    timings: dict[str, Timing]
    errors: dict[str, float]
    refused: str = ""
    core_share: float = 1.0

    def microseconds(self, name: str) -> float | None:
        """Of one time step; None if ``name`` did not run."""
        return self.timings[name].median / self.shape.steps * 1e6 if name in self.timings else None

    def best_peer(self) -> str | None:
        """The fastest contestant but ours."""
        others = [name for name in self.timings if name != OURS.name]
        return min(others, key=lambda name: self.timings[name].median, default=None)

    def ratio(self) -> float | None:
        """How many times faster than the best peer ours is; below 1 it is slower."""
        ours, best = self.microseconds(OURS.name), self.best_peer()
        other = self.microseconds(best) if best else None
        return other / ours if ours and other else None


def measure(shape: Shape, mode: Mode, peers: Sequence[Peer], threads: int, seconds: float) -> Row:
    """Build, compare and time ours and ``peers`` on ``shape``.

    Raises:
        ArithmeticError: a contestant's numbers are not the answer's.
    """
    problem = make_problem(shape, mode)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    refused = ""
    # Machine code or nothing: a silent fall back to the Python loop would be timed under the wrong name.
    with torch.inference_mode(not mode.training), fc.runner("compiled"):
        for peer in (OURS, *peers):
            call = peer.build(problem, threads)
            if call is None:
                continue
            try:
                found = peer.arrays(problem, call())
            except NotCompilable as reason:
                refused = str(reason)
                continue
            errors[peer.name] = _error(peer.name, problem, found)
            calls[peer.name] = call
        wall, processor = time.perf_counter(), time.process_time()
        timings = take_turns(calls, seconds / len(calls), threads=threads) if calls else {}
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    return Row(shape, mode, timings, errors, refused, share)


def _error(name: str, problem: Problem, found: Mapping[str, Array]) -> float:
    """The largest of all that a contestant found."""
    if found.keys() != problem.answer.keys():
        raise ArithmeticError(
            f"{name} on {problem.shape.name}: gave {sorted(found)}, expected {sorted(problem.answer)}."
        )
    return max(_compare(f"{name} on {problem.shape.name}", problem, each, found[each]) for each in problem.answer)


def _compare(where: str, problem: Problem, name: str, found: Array) -> float:
    answer = problem.answer[name]
    if found.shape != answer.shape:
        raise ArithmeticError(f"{where}: {name} of {found.shape}, expected {answer.shape}.")
    error, largest = float(np.abs(found - answer).max()), float(np.abs(answer).max())
    # Gradients are sums over steps and rows, of any size.
    error, bound = (error / largest, _TOLERANCE) if problem.mode.training else (error, _TOLERANCE * max(1.0, largest))
    if not error <= bound:  # NaN too
        raise ArithmeticError(f"{where}: {name} is off by {error:.2g}, expected at most {bound:.2g}.")
    return error
